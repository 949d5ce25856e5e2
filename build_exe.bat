@echo off
rem Builds eco_train.exe: one folder that needs neither Python nor a compiler to run.
rem Needs Windows, 64-bit Python 3.13 with its launcher py.exe, and the network.
rem A step that fails ends the build with its reason and exit code 1.
rem
rem SIGMA_BUILD_PYTHON    a python.exe that holds all packages already: nothing is installed
rem SIGMA_BUILD_LOCKFILE  the pins to install and to verify, instead of the CUDA lockfile
setlocal EnableExtensions DisableDelayedExpansion
cd /d "%~dp0"
set "LOCKFILE=requirements-py313-cu128.txt"
if defined SIGMA_BUILD_LOCKFILE set "LOCKFILE=%SIGMA_BUILD_LOCKFILE%"
if not exist build mkdir build

rem A running program holds the files that are about to be replaced.
set "REASON=eco_train.exe is running: close it and build again"
tasklist /FI "IMAGENAME eq eco_train.exe" /NH 2>nul | findstr /I "eco_train.exe" >nul
if %errorlevel% equ 0 goto fail

rem Visual Studio 2026, where it is installed: only for people who build kernels of their own.
set "VS=C:\Program Files\Microsoft Visual Studio\18\Insiders"
set "VSCMD_START_DIR=%CD%"
if exist "%VS%\Common7\Tools\VsDevCmd.bat" goto vsdevcmd
if exist "%VS%\VC\Auxiliary\Build\vcvars64.bat" goto vcvars
echo [build] Visual Studio 2026 is not here; it is not needed
goto toolchain
:vsdevcmd
set "REASON=VsDevCmd.bat of Visual Studio 2026 failed: repair the installation"
call "%VS%\Common7\Tools\VsDevCmd.bat" -arch=amd64 -host_arch=amd64
if %errorlevel% neq 0 goto fail
goto toolchain
:vcvars
set "REASON=vcvars64.bat of Visual Studio 2026 failed: repair the installation"
call "%VS%\VC\Auxiliary\Build\vcvars64.bat"
if %errorlevel% neq 0 goto fail
:toolchain
cd /d "%~dp0"

rem CUDA 12.8 does not know Visual Studio 2026 yet.
set "TORCH_NVCC_FLAGS=--allow-unsupported-compiler %TORCH_NVCC_FLAGS%"
set "CUDAFLAGS=--allow-unsupported-compiler %CUDAFLAGS%"
set "CMAKE_CUDA_FLAGS=--allow-unsupported-compiler %CMAKE_CUDA_FLAGS%"

rem A libtorch of one's own, in the project's folder or beside it.
set "LIBTORCH="
if exist "..\libtorch\lib" set "LIBTORCH=%CD%\..\libtorch"
if exist "libtorch\lib" set "LIBTORCH=%CD%\libtorch"
if not defined LIBTORCH goto python
echo [build] libtorch: %LIBTORCH%
set "PATH=%LIBTORCH%\lib;%PATH%"
set "LIB=%LIBTORCH%\lib;%LIB%"
set "INCLUDE=%LIBTORCH%\include;%LIBTORCH%\include\torch\csrc\api\include;%INCLUDE%"

:python
set "PYTHON=%SIGMA_BUILD_PYTHON%"
if defined SIGMA_BUILD_PYTHON goto version
set "PYTHON=%CD%\build\venv\Scripts\python.exe"
if exist "%PYTHON%" goto version
echo [build] making build\venv
set "REASON=Python 3.13 could not make build\venv: install it, 64 bit, with the launcher py.exe"
py -3.13 -m venv build\venv
if %errorlevel% neq 0 goto fail
:version
set "REASON=%PYTHON% is no 64-bit Python 3.13: delete build\venv or change SIGMA_BUILD_PYTHON"
"%PYTHON%" -c "import sys; sys.exit(sys.version_info[:2] != (3, 13) or sys.maxsize < 2**32)"
if %errorlevel% neq 0 goto fail
if defined SIGMA_BUILD_PYTHON goto verify

echo [build] installing %LOCKFILE%
set "REASON=pip could not be upgraded: is the network there?"
"%PYTHON%" -m pip install --upgrade pip
if %errorlevel% neq 0 goto fail
rem uv knows where PyTorch keeps its CUDA 12.8 builds; pip then finds them in place.
set "REASON=uv could not be installed: is the network there?"
"%PYTHON%" -m pip install uv==0.13.8
if %errorlevel% neq 0 goto fail
set "REASON=%LOCKFILE% is missing or pins no torch: fetch the project again"
findstr /R "^torch.*==" "%LOCKFILE%" > build\torch_pins.txt
if %errorlevel% neq 0 goto fail
set "REASON=PyTorch for CUDA 12.8 could not be installed: see the lines above"
"%PYTHON%" -m uv pip install --python "%PYTHON%" --torch-backend cu128 --only-binary :all: --constraint "%LOCKFILE%" --requirement build\torch_pins.txt
if %errorlevel% neq 0 goto fail
set "REASON=the packages of %LOCKFILE% could not be installed: see the lines above"
"%PYTHON%" -m pip install --only-binary :all: --requirement "%LOCKFILE%"
if %errorlevel% neq 0 goto fail

:verify
echo [build] verifying imports and symbols
set "REASON=a package is missing or broken: see the failed checks above"
"%PYTHON%" scripts\verify_runtime.py --lockfile "%LOCKFILE%"
if %errorlevel% neq 0 goto fail

echo [build] packing
set "REASON=PyInstaller failed: see the lines above"
"%PYTHON%" -m PyInstaller --noconfirm --distpath dist --workpath build\pyinstaller scripts\freeze\eco_train.spec
if %errorlevel% neq 0 goto fail

echo [build] copying the program to the project's folder
set "REASON=the old _internal could not be removed: close what uses it"
if exist _internal rmdir /S /Q _internal
if exist _internal goto fail
set "REASON=dist\eco_train could not be copied: is the disk full?"
xcopy /E /I /Q /Y dist\eco_train\_internal _internal
if %errorlevel% neq 0 goto fail
copy /Y dist\eco_train\eco_train.exe eco_train.exe
if %errorlevel% neq 0 goto fail

echo [build] the program examines itself
set "REASON=eco_train.exe is not whole: see the failed checks above"
.\eco_train.exe --mode doctor --self-check
if %errorlevel% neq 0 goto fail

echo [build] done: eco_train.exe in %CD%; double-click it, or eco_train.exe --help
if not defined CI pause
exit /b 0

:fail
echo [build] FAILED: %REASON% 1>&2
if not defined CI pause
exit /b 1
