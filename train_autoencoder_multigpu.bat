@echo off
rem Stage 1 on the GPUs of a Windows machine. Relative paths start at the current folder.
rem   train_autoencoder_multigpu.bat NUM_GPUS CONFIG AMP COMPILE
rem   train_autoencoder_multigpu.bat 4 config/config_train_multigpu.json true false
setlocal

if "%~4"=="" goto usage
if not "%~5"=="" goto usage

rem What is left of a number without its digits is nothing, and then the loop has no turn.
for /f "delims=0123456789" %%c in ("%~1") do goto bad_number
if %~1 lss 1 goto bad_number
if not exist "%~2" goto no_config
set "AMP="
if /i "%~3"=="true" set "AMP=true"
if /i "%~3"=="false" set "AMP=false"
if not defined AMP goto bad_amp
set "COMPILE="
if /i "%~4"=="true" set "COMPILE=true"
if /i "%~4"=="false" set "COMPILE=false"
if not defined COMPILE goto bad_compile

set "PYTHON=%~dp0.venv\Scripts\python.exe"
if not exist "%PYTHON%" set "PYTHON=python"
rem There is no nccl on Windows.
set SETTINGS=--set amp=%AMP% --set compile=%COMPILE% --set ddp_backend=gloo
set ARGUMENTS=-c "%~2" -e "%~dp0config\environment.json" -g %~1 %SETTINGS%

rem A mistake that shows before the processes start is one line; from within them it becomes a traceback.
set "LOOK=import sys; sys.path[0] = sys.argv.pop(1); import utils; a = utils.training_parser('').parse_args()"
set "LOOK=%LOOK%; utils.run_script(lambda: (utils.distributed.check_gpus(a.gpus), utils.read_settings(a)))"
set "LOCAL_WORLD_SIZE=%~1"
call "%PYTHON%" -c "%LOOK%" "%~dp0." %ARGUMENTS%
if errorlevel 1 exit /b 2

rem torch has no libuv on Windows, and torchrun's --standalone fails without it: let the processes meet through a file.
set "USE_LIBUV=0"
set "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
set MEET=--rdzv-backend=c10d --rdzv-conf=store_type=file --local-addr=127.0.0.1
call "%PYTHON%" -m torch.distributed.run %MEET% --nproc-per-node=%~1 "%~dp0train_autoencoder.py" %ARGUMENTS%
exit /b %ERRORLEVEL%

:usage
>&2 echo usage: train_autoencoder_multigpu.bat NUM_GPUS CONFIG AMP COMPILE
>&2 echo error: four arguments are needed, as in: 4 config/config_train_multigpu.json true false
exit /b 2

:bad_number
>&2 echo error: NUM_GPUS "%~1": must be a number, 1 or more
exit /b 2

:no_config
>&2 echo error: CONFIG "%~2": there is no such file
exit /b 2

:bad_amp
>&2 echo error: AMP "%~3": must be true or false
exit /b 2

:bad_compile
>&2 echo error: COMPILE "%~4": must be true or false
exit /b 2
