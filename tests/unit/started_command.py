"""What DeepSpeed's launcher would start."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagle3_ds.launch.command import LaunchPlan, write_environment_file


def started(
    plan: LaunchPlan, monkeypatch: pytest.MonkeyPatch, devices: int = 4, may_ask: bool = True
) -> list[str]:
    """The command that DeepSpeed's runner makes of a plan on a machine with so many devices and with every
    launcher; nothing is started.

    Args:
        may_ask: whether it may try by ssh to reach hosts.
    """
    runner = pytest.importorskip("deepspeed.launcher.runner")
    commands: list[list[str]] = []

    class Process:
        returncode = 0

        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            commands.append(command)

        def wait(self) -> None: ...

    for name, value in plan.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runner.subprocess, "Popen", Process)
    monkeypatch.setattr(
        runner.subprocess, "check_call", lambda *_, **__: 0 if may_ask else pytest.fail("asks for ssh")
    )
    monkeypatch.setattr(runner.subprocess, "check_output", lambda *_, **__: b"10.0.0.7\n")
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
    # It would set the level of pytest's handlers too, for all tests that follow.
    monkeypatch.setattr(runner, "set_log_level_from_string", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(type(runner.get_accelerator()), "device_count", lambda _: devices)
    if plan.exported is not None:
        Path(plan.environment["DS_ENV_FILE"]).parent.mkdir(parents=True, exist_ok=True)
        # Read once, when its module was imported.
        monkeypatch.setattr(runner, "DEEPSPEED_ENVIRONMENT_NAME", plan.environment["DS_ENV_FILE"])
        write_environment_file(plan)
    runner.main(list(plan.command[3:]))
    (command,) = commands
    return command
