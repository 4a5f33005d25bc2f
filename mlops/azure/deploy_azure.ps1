<#
.SYNOPSIS
Creates or updates the Azure ML workspace of one environment, and what it stands on.

.DESCRIPTION
Deploys infrastructure.json with parameters.<Environment>.json, then registers the environments that jobs and the
endpoint run in. Every step may be repeated: what is there already stays, or is brought to what the files say.
It stops at the first command that fails. Nothing it reads or writes is a secret; sign in with `az login` before.

.PARAMETER Environment
Which parameter file: dev, staging or prod.

.PARAMETER ResourceGroup
Resource group; made where it is missing.

.PARAMETER Location
Region, as westeurope. A resource group that is there stays in its own.

.EXAMPLE
./deploy_azure.ps1 -Environment dev -ResourceGroup rg-ldm3d-dev -Location westeurope -WhatIf

.EXAMPLE
./deploy_azure.ps1 -Environment prod -ResourceGroup rg-ldm3d-prod -Location westeurope
#>
[CmdletBinding(SupportsShouldProcess = $true, ConfirmImpact = 'High')]
param(
    [Parameter(Mandatory = $true)]
    [ValidateSet('dev', 'staging', 'prod')]
    [string] $Environment,

    [Parameter(Mandatory = $true)]
    [ValidatePattern('^[A-Za-z0-9._()-]{1,89}[A-Za-z0-9_()-]$')]
    [string] $ResourceGroup,

    [Parameter(Mandatory = $true)]
    [ValidatePattern('^[a-z0-9]{3,40}$')]
    [string] $Location
)

Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'

$Template = Join-Path $PSScriptRoot 'infrastructure.json'
$Parameters = Join-Path $PSScriptRoot "parameters.$Environment.json"
$Deployment = "ldm3d-$Environment"

# A program that fails stops no PowerShell script: its exit status must be looked at. So every az goes through here.
function Invoke-Az {
    [OutputType([string])]
    param(
        [Parameter(Mandatory = $true)]
        [string[]] $Arguments
    )
    Write-Verbose "az $($Arguments -join ' ')"
    $output = & az @Arguments --only-show-errors
    if ($LASTEXITCODE -ne 0) {
        throw "az $($Arguments -join ' ') failed with exit status $LASTEXITCODE"
    }
    return ($output -join "`n")
}

function Test-Prerequisite {
    if (-not (Get-Command az -ErrorAction SilentlyContinue)) {
        throw 'The Azure CLI is not installed: see its documentation for how to get it, then run az login.'
    }
    $extensions = Invoke-Az -Arguments @('extension', 'list', '--query', '[].name', '--output', 'tsv')
    if (($extensions -split "`n") -notcontains 'ml') {
        throw 'The Azure CLI lacks its extension ml: run az extension add --name ml.'
    }
    $account = Invoke-Az -Arguments @('account', 'show', '--output', 'json') | ConvertFrom-Json
    Write-Host "Subscription $($account.name) ($($account.id))"
}

function Get-DeploymentArguments {
    param(
        [Parameter(Mandatory = $true)]
        [string] $Action
    )
    return @(
        'deployment', 'group', $Action, '--resource-group', $ResourceGroup, '--name', $Deployment,
        '--template-file', $Template, '--parameters', "@$Parameters", '--parameters', "location=$Location"
    )
}

# Versions of environments never change, so one that is there is left alone.
function Register-MlEnvironment {
    [CmdletBinding(SupportsShouldProcess = $true)]
    param(
        [Parameter(Mandatory = $true)]
        [string] $File,

        [Parameter(Mandatory = $true)]
        [string] $Workspace
    )
    $lines = Get-Content -Path $File
    $name = ($lines | Select-String -Pattern '^name: (.+)$').Matches[0].Groups[1].Value
    $version = ($lines | Select-String -Pattern '^version: (.+)$').Matches[0].Groups[1].Value
    $place = @('--resource-group', $ResourceGroup, '--workspace-name', $Workspace)
    $names = (Invoke-Az -Arguments (@('ml', 'environment', 'list', '--query', '[].name', '--output', 'tsv') + $place)) -split "`n"
    $versions = @()
    if ($names -contains $name) {
        $query = @('ml', 'environment', 'list', '--name', $name, '--query', '[].version', '--output', 'tsv')
        $versions = (Invoke-Az -Arguments ($query + $place)) -split "`n"
    }
    if ($versions -contains $version) {
        Write-Host "Environment ${name}:$version is there"
    }
    elseif ($PSCmdlet.ShouldProcess("${name}:$version", 'register environment')) {
        Invoke-Az -Arguments (@('ml', 'environment', 'create', '--file', $File) + $place) | Out-Null
        Write-Host "Environment ${name}:$version registered"
    }
}

foreach ($file in @($Template, $Parameters)) {
    if (-not (Test-Path -Path $file -PathType Leaf)) {
        throw "$file is missing"
    }
}
Test-Prerequisite

$exists = Invoke-Az -Arguments @('group', 'exists', '--name', $ResourceGroup)
if ($exists -eq 'false') {
    if ($PSCmdlet.ShouldProcess($ResourceGroup, "create resource group in $Location")) {
        Invoke-Az -Arguments @('group', 'create', '--name', $ResourceGroup, '--location', $Location) | Out-Null
    }
    elseif ($WhatIfPreference) {
        Write-Host "What a deployment would change cannot be said before the resource group exists."
        return
    }
}

if ($WhatIfPreference) {
    Write-Host (Invoke-Az -Arguments (Get-DeploymentArguments -Action 'what-if'))
    return
}

if (-not $PSCmdlet.ShouldProcess("$ResourceGroup ($Environment)", 'deploy infrastructure.json')) {
    return
}
Invoke-Az -Arguments (Get-DeploymentArguments -Action 'validate') | Out-Null
$created = (Get-DeploymentArguments -Action 'create') + @('--query', 'properties.outputs', '--output', 'json')
$outputs = Invoke-Az -Arguments $created | ConvertFrom-Json
foreach ($file in (Get-ChildItem -Path $PSScriptRoot -Filter 'environment_*.yml' | Sort-Object -Property Name)) {
    Register-MlEnvironment -File $file.FullName -Workspace $outputs.workspaceName.value
}
Write-Host "Workspace         $($outputs.workspaceName.value)"
Write-Host "Registry          $($outputs.registryLoginServer.value)"
Write-Host "Storage           $($outputs.storageAccountName.value)"
Write-Host "Key Vault         $($outputs.keyVaultUri.value)"
Write-Host "Endpoint identity $($outputs.endpointIdentityId.value)"
