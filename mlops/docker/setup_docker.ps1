<#
.SYNOPSIS
    Builds the image and starts what -Mode names. setup_docker.sh does the same on Linux.

.EXAMPLE
    mlops/docker/setup_docker.ps1 -Environment prod -Mode api

.PARAMETER Environment
    prod: the code of the image; dev: this checkout's code, and Jupyter.

.PARAMETER Mode
    api: the service, at http://127.0.0.1:8000/; its first start prints a key.
    train: both stages of the demo, on phantoms that are made the first time.
    jupyter: notebooks at http://127.0.0.1:8888/, in dev.

.PARAMETER Variant
    cpu or cuda.

.PARAMETER Arguments
    The rest is handed on to the program; in train, to both stages.
#>
#Requires -Version 7.2
[CmdletBinding(PositionalBinding = $false)]
param(
    [ValidateSet('dev', 'prod')] [string] $Environment = 'prod',
    [ValidateSet('api', 'train', 'jupyter')] [string] $Mode = 'api',
    [ValidateSet('cpu', 'cuda')] [string] $Variant = 'cpu',
    [Parameter(ValueFromRemainingArguments = $true)] [string[]] $Arguments = @()
)

$ErrorActionPreference = 'Stop'
Set-StrictMode -Version 3.0

function Stop-WithError([string] $Message) {
    [Console]::Error.WriteLine("error: $Message")
    exit 2
}

# A program that fails does not stop PowerShell by itself.
function Invoke-Docker([string[]] $Words) {
    & docker @Words
    if ($LASTEXITCODE -ne 0) { exit $LASTEXITCODE }
}

if ($Mode -eq 'jupyter' -and $Environment -ne 'dev') { Stop-WithError '-Mode jupyter needs -Environment dev' }
if (-not (Get-Command docker -ErrorAction SilentlyContinue)) {
    Stop-WithError 'docker is not installed, or not on PATH'
}

$Root = (Resolve-Path (Join-Path $PSScriptRoot '../..')).Path
$Version = (Select-String -Path (Join-Path $Root 'ldm3d/__init__.py') -Pattern '^__version__ = "(.*)"').Matches[0].Groups[1].Value
$Image = "ldm3d:$Version-$Variant"
if ($Environment -eq 'dev') { $Image += '-dev' }

Invoke-Docker @(
    'build', '--file', (Join-Path $Root 'mlops/docker/Dockerfile'), '--target', $Environment, '--tag', $Image,
    '--build-arg', "VARIANT=$Variant", '--build-arg', "VERSION=$Version", '--build-arg', "TORCH_INDEX=$env:TORCH_INDEX",
    $Root
)

$Tmp = '/tmp'
# Kernels that a GPU's `compile: true` makes are loaded from there, and Docker would forbid it.
if ($Variant -eq 'cuda') { $Tmp += ':exec' }
$Flags = @(
    '--read-only', '--tmpfs', $Tmp, '--cap-drop', 'ALL', '--security-opt', 'no-new-privileges', '--shm-size', '1g',
    '--volume', 'ldm3d-data:/data', '--volume', 'ldm3d-datasets:/datasets', '--volume', 'ldm3d-models:/models',
    '--volume', 'ldm3d-outputs:/outputs'
)
if ($Variant -eq 'cuda') { $Flags += @('--gpus', 'all') }
if ($Environment -eq 'dev') { $Flags += @('--volume', "${Root}:/app:ro") }
$Python = @('run', '--rm') + $Flags + @('--entrypoint', 'python', $Image)

function Start-Api {
    $Keys = Invoke-Docker ($Python + @('-m', 'mlops.api.keys', 'list'))
    if (-not $Keys) {
        Write-Output 'the first key; it is shown this once:'
        Invoke-Docker ($Python + @('-m', 'mlops.api.keys', 'create', '--name', [Environment]::UserName, '--role', 'admin'))
    }
    if (docker ps --all --quiet --filter 'name=^ldm3d-api$') { Invoke-Docker @('rm', '--force', 'ldm3d-api') | Out-Null }
    Invoke-Docker (@('run', '--detach', '--name', 'ldm3d-api', '--restart', 'unless-stopped',
            '--publish', '127.0.0.1:8000:8000') + $Flags + @($Image) + $Arguments) | Out-Null
    foreach ($Try in 1..60) {
        & docker exec ldm3d-api python mlops/docker/health_check.py --ready *> $null
        if ($LASTEXITCODE -eq 0) {
            Write-Output 'ready: http://127.0.0.1:8000/'
            return
        }
        Start-Sleep -Seconds 2
    }
    & docker logs ldm3d-api
    Stop-WithError 'the service was not ready within 2 minutes; what it said stands above'
}

function Start-Training {
    $Files = @('-c', 'config/config_demo.json', '-e', 'mlops/docker/environment.json')
    $Look = 'import pathlib, sys; sys.exit(not pathlib.Path(''/datasets/Task01_BrainTumour/dataset.json'').exists())'
    & docker @Python -c $Look
    if ($LASTEXITCODE -ne 0) {
        Invoke-Docker ($Python + @('download_brats_data.py', '-e', 'mlops/docker/environment.json', '--phantom', '420'))
    }
    foreach ($Stage in 'autoencoder', 'diffusion') {
        Invoke-Docker (@('run', '--rm') + $Flags + @('--env', 'MODE=train', '--env', "STAGE=$Stage", $Image) + $Files + $Arguments)
    }
}

switch ($Mode) {
    'api' { Start-Api }
    'train' { Start-Training }
    'jupyter' {
        Invoke-Docker (@('run', '--rm', '--publish', '127.0.0.1:8888:8888') + $Flags +
            @('--env', 'MODE=jupyter', $Image) + $Arguments)
    }
}
