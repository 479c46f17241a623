"""The command line before anything starts: hosts, commands, dry runs of the shipped recipes, refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from pydantic import JsonValue
from transformers import LlamaConfig

from eagle3_ds.checkpoint.format import (
    Manifest,
    aside_folder,
    folder_name,
    publish,
    read_manifest,
    write_manifest,
)
from eagle3_ds.cli.launch import launch as launch_command
from eagle3_ds.cli.main import commands, main
from eagle3_ds.config import Recipe, dump_recipe, load_recipe
from eagle3_ds.launch.command import (
    LaunchOptions,
    plan_launch,
    read_hostfile,
    resolve_hosts,
    write_environment_file,
)
from eagle3_ds.launch.probe import free_port
from eagle3_ds.run.checks import RESULTS, check_output, clear_output
from tests.unit.started_command import started

ROOT = Path(__file__).parents[2]
TWO_NODES = ("--hostfile", "recipes/2nodes.hostfile")
SHIPPED = {
    "quickstart": ((), "draft_dp 1 x ring 2 x ulysses 2 = 4 ranks"),
    "quickstart_peagle": ((), "draft_dp 1 x ring 2 x ulysses 2 = 4 ranks"),
    "quickstart_dflash": ((), "draft_dp 1 x ring 2 x ulysses 2 = 4 ranks"),
    "llama3.1-8b_8k_zero2": (("--num_gpus", "8"), "draft_dp 8 x ring 1 x ulysses 1 = 8 ranks"),
    "llama3.1-8b_128k_usp": (("--num_gpus", "8"), "draft_dp 1 x ring 2 x ulysses 4 = 8 ranks"),
    "llama3.1-8b_128k_peagle": (("--num_gpus", "8"), "draft_dp 1 x ring 2 x ulysses 4 = 8 ranks"),
    "qwen3-8b_128k_usp": (("--num_gpus", "8"), "draft_dp 1 x ring 1 x ulysses 8 = 8 ranks"),
    "qwen3-8b_128k_dflash": (("--num_gpus", "8"), "draft_dp 1 x ring 1 x ulysses 8 = 8 ranks"),
    "qwen3-32b_128k_2nodes": (TWO_NODES, "draft_dp 1 x ring 2 x ulysses 8 = 16 ranks"),
}


@pytest.fixture(autouse=True)
def at_root_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_every_shipped_recipe_is_dry_run() -> None:
    assert sorted(SHIPPED) == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_dry_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, mesh = SHIPPED[name]
    output = tmp_path / "run"
    assert main(["launch", f"recipes/{name}.yaml", *options, "--dry-run", f"output_dir={output}"]) == 0
    text = capsys.readouterr().out
    assert mesh in text
    assert (
        "--module eagle3_ds.launch.supervisor --log_folder=" in text
        and " eagle3_ds.train.main --recipe=" in text
    )
    assert f"output_dir: {output}" in text
    assert "nothing was started" in text
    assert not output.exists()


def test_capture_is_launched_like_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [
        "recipes/quickstart.yaml",
        "--num_ranks",
        "8",
        "parallel.draft_dp=2",
        f"output_dir={tmp_path / 'run'}",
    ]
    assert main(["capture", *where, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "draft_dp 2 x ring 2 x ulysses 2 = 8 ranks" in text and "capture: parallel" in text
    assert " eagle3_ds.train.capture --recipe=" in text and "eagle3_ds.train.main" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["target.capture=parallel", "data.hidden_states=online"])
def test_a_target_that_cannot_be_cut_is_refused_before_anything_starts(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rope = {
        "rope_type": "dynamic",
        "factor": 2.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 1024,
    }
    LlamaConfig(vocab_size=4096, num_key_value_heads=8, rope_parameters=rope).save_pretrained(
        tmp_path / "target"
    )
    arguments = ["recipes/quickstart.yaml", "target.build=null", f"target.path={tmp_path / 'target'}"]
    message = refusal(capsys, "launch", *arguments, key, f"output_dir={tmp_path / 'run'}")
    assert "dynamic rotary scaling depend on the length" in message and "target.capture: single" in message
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_the_ranks_fill_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["recipes/quickstart.yaml", "--num_gpus", "8", "--dry-run", f"output_dir={tmp_path / 'run'}"]
    assert main(["launch", *words, "parallel.draft_dp=null"]) == 0
    told = capsys.readouterr().out
    assert "inferred: parallel.draft_dp = 2, the 8 ranks over ulysses 2 x ring 2" in told
    assert "draft_dp: 2" in told, "the resolved recipe says it"
    assert main(["launch", *words, "parallel.draft_dp=2"]) == 0
    assert "inferred" not in capsys.readouterr().out


def test_dry_run_says_what_it_could_not_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "recipes/qwen3-8b_128k_usp.yaml", "--num_gpus", "8", "--dry-run"]) == 0
    assert (
        "Qwen/Qwen3-8B is not a folder here: its heads and vocabulary were not checked"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num_gpus", "6"], ["world size", "6", "ulysses 2 x ring 2 = 4", "4 or 8"]),
        (["--num_gpus", "8"], ["parallel.draft_dp 1", "world size is 8"]),
        (
            ["parallel.ulysses=4", "parallel.ring=1"],
            ["parallel.ulysses is 4", "4 query heads and 2 key/value", "to 2;"],
        ),
        (["draft.vocab_size=5000"], ["draft.vocab_size = 5000", "1024"]),
        (
            ["loss.tile_bytes=1000"],
            ["loss.tile_bytes = 1000", "draft vocabulary of 768", "bytes are needed"],
        ),
        (
            ["train.tile_bytes=1000"],
            ["train.tile_bytes = 1000", "MLP of 384", f"at least {(7 * 384 + 8 * 128) * 4} bytes"],
        ),
        (["parallel.ulises=4"], ["parallel.ulises", "Did you mean `ulysses`"]),
        (["deepspeed=nowhere.json"], ["nowhere.json is not a file"]),
        (["--num_nodes", "2"], ["--num_nodes is 2", "--hostfile"]),
        (["--num_gpus", "0"], ["is 0", "at least 1"]),
        (["--hostfile", "nowhere"], ["--hostfile: nowhere is not a file"]),
        ([*TWO_NODES, "--launcher", "torchrun"], ["torchrun", "this machine only"]),
        ([*TWO_NODES, "--launcher", "openmpi", "--num_gpus", "4"], ["openmpi", "--num_ranks", "hostfile"]),
        ([*TWO_NODES, "--include", "node-0", "--num_gpus", "2"], ["--include", "--num_ranks"]),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, "launch", "recipes/quickstart.yaml", "--dry-run", *arguments)
    assert "Traceback" not in message
    for word in words:
        assert word in message, message


def test_refused_deepspeed_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"sequence_parallel_size": 4}')
    message = refusal(capsys, "launch", "recipes/quickstart.yaml", "--dry-run", "--ds_config", str(path))
    assert "`sequence_parallel_size` is refused" in message


def test_unavailable_kernel_is_named_with_what_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(
        capsys, "launch", "recipes/quickstart.yaml", "attention.kernel=cuda", f"output_dir={tmp_path / 'run'}"
    )
    assert "'cuda' cannot run" in message and "blockwise" in message
    assert not (tmp_path / "run").exists()


def test_missing_target_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = f"output_dir={tmp_path / 'run'}"
    common = ["launch", "recipes/quickstart.yaml", output]
    assert "is not a folder" in refusal(
        capsys, *common, "target.build=null", f"target.path={tmp_path / 'none'}"
    )
    assert "data.train[0]" in refusal(capsys, *common, "data.train=[nowhere.jsonl]")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    assert "config.json" in refusal(capsys, *common, "target.build=null", f"target.path={foreign}")
    (foreign / "config.json").write_text('{"model_type": "bloom"}')
    assert "bloom" in refusal(capsys, *common, "target.build=null", f"target.path={foreign}")


# The output folder


def finished_run(folder: Path, *overrides: str) -> None:
    folder.mkdir()
    recipe = load_recipe("recipes/quickstart.yaml", [f"output_dir={folder}", *overrides])
    (folder / "recipe.resolved.yaml").write_text(dump_recipe(recipe))
    (folder / "metrics.jsonl").write_text("{}\n")
    add_checkpoint(folder, recipe, 4)


def add_checkpoint(folder: Path, recipe: Recipe, step: int) -> Path:
    """As a run leaves it, but without any tensor."""
    root = folder / "checkpoints"
    aside = aside_folder(root, step)
    aside.mkdir(parents=True)
    manifest = Manifest(
        step=step,
        packs=step,
        adam_steps=step,
        skipped_steps=0,
        heldout_loss=None,
        recipe=recipe.model_dump(mode="json"),
        mesh={},
        parameters={},
        versions={},
        files={},
    )
    write_manifest(aside, manifest)
    publish(aside, root / folder_name(step), step)
    return root / folder_name(step)


def test_a_folder_with_a_run_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    finished_run(folder, "target.aux_layers=[0, 1, 2]")
    before = sorted(folder.rglob("*"))
    launch = ["launch", "recipes/quickstart.yaml", f"output_dir={folder}"]
    message = refusal(capsys, *launch)
    for words in ("already holds a run", "metrics.jsonl", "--resume", "--overwrite"):
        assert words in message
    assert "target.aux_layers: [0, 1, 2] -> None" in refusal(capsys, *launch, "--resume")
    assert "contradict" in refusal(capsys, *launch, "--resume", "--overwrite")
    assert "target.aux_layers: [0, 1, 2] -> None" in refusal(capsys, *launch, "--resume", "auto")
    assert "no checkpoint" in refusal(capsys, *launch[:2], f"output_dir={tmp_path / 'new'}", "--resume")
    (folder / "recipe.resolved.yaml").rename(tmp_path / "elsewhere")
    assert "is not a run of this program" in refusal(capsys, *launch, "--overwrite")
    assert sorted(folder.rglob("*")) == [path for path in before if path.name != "recipe.resolved.yaml"]


def test_what_resuming_starts_from(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = load_recipe("recipes/quickstart.yaml", [f"output_dir={folder}"])
    assert check_output(recipe, "auto", overwrite=False)[0] is None
    finished_run(folder)
    older, newer = folder / "checkpoints" / "step-000004", add_checkpoint(folder, recipe, 8)
    for how in ("latest", "auto"):
        assert check_output(recipe, how, overwrite=False) == (newer, [f"going on from {newer}"])
    (newer / "manifest.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"manifest.json .*step-000004 is the newest intact one; `--resume auto` takes it"
    ):
        check_output(recipe, "latest", overwrite=False)
    found, told = check_output(recipe, "auto", overwrite=False)
    assert found == older and told[-1] == f"going on from {older}"
    assert told[0].startswith(f"passed over: {newer / 'manifest.json'} is damaged")
    (older / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match="no checkpoint in .* is intact .*step-000008.*step-000004.*--overwrite"
    ):
        check_output(recipe, "auto", overwrite=False)


def test_a_run_without_a_checkpoint_is_begun_again_by_resume_auto(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finished_run(folder)
    shutil.rmtree(folder / "checkpoints")
    recipe = load_recipe("recipes/quickstart.yaml", [f"output_dir={folder}"])
    found, told = check_output(recipe, "auto", overwrite=False)
    assert found is None and told == ["there is no checkpoint yet, so the run starts from the beginning"]
    other = load_recipe("recipes/quickstart.yaml", [f"output_dir={folder}", "train.seed=7"])
    with pytest.raises(ValueError, match="train.seed: 0 -> 7"):
        check_output(other, "auto", overwrite=False)
    (folder / "recipe.resolved.yaml").unlink()
    with pytest.raises(ValueError, match="is not a run of this program"):
        check_output(recipe, "auto", overwrite=False)


def test_mesh_zero_stage_and_schedule_may_change_on_resume_but_not_the_experiment(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finished_run(folder)
    common = [f"output_dir={folder}"]
    free = [
        "parallel.ring=1",
        "parallel.zero_group=draft_dp",
        "deepspeed=ds_configs/zero1.json",
        "train.steps=90",
        "train.accumulation=2",
    ]
    found, _ = check_output(load_recipe("recipes/quickstart.yaml", common + free), "latest", overwrite=False)
    assert found is not None
    for fixed in (
        "train.seed=1",
        "train.init_from=draft",
        "data.max_length=1024",
        "draft.ttt_steps=3",
        "loss.decay=0.5",
    ):
        with pytest.raises(ValueError, match=fixed.partition("=")[0]):
            check_output(load_recipe("recipes/quickstart.yaml", [*common, fixed]), "latest", overwrite=False)


def test_a_checkpoint_of_another_version_is_refused_by_its_keys(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finished_run(folder)
    recipe = load_recipe("recipes/quickstart.yaml", [f"output_dir={folder}"])
    manifest = read_manifest(folder / "checkpoints" / "step-000004")
    content = {**manifest.recipe, "draft": {**manifest.recipe["draft"], "unheard_of": 1}}
    write_manifest(folder / "checkpoints" / "step-000004", manifest.model_copy(update={"recipe": content}))
    with pytest.raises(
        ValueError, match="another version of this program, which has other recipe keys .draft.unheard_of."
    ):
        check_output(recipe, "latest", overwrite=False)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--resume", "train.steps=9"], ("latest", ["train.steps=9"])),
        (["train.steps=9", "--resume"], ("latest", ["train.steps=9"])),
        (["--resume", "auto", "train.steps=9"], ("auto", ["train.steps=9"])),
        (["--resume=auto"], ("auto", [])),
        (["train.steps=9"], (None, ["train.steps=9"])),
    ],
)
def test_resume_takes_no_override_for_its_value(
    words: list[str], expected: tuple[str | None, list[str]]
) -> None:
    options = launch_command.make_context("launch", ["recipe.yaml", *words]).params
    assert (options["resume"], list(options["overrides"])) == expected


def test_overwriting_removes_only_what_a_run_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finished_run(folder)
    (folder / "notes.txt").write_text("mine")
    clear_output(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert not any((folder / name).exists() for name in RESULTS)


# Hosts and commands


def test_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# mine\nb slots=2  # first\n\na slots=1\n")
    assert list(read_hostfile(path).items()) == [("b", (0, 1)), ("a", (0,))]
    for text, words in [
        ("a 8\n", "line 1: 'a 8' is not of the form"),
        ("a slots=2\na slots=2", "line 2: host a is given twice"),
        ("\n", "names no host"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_hostfile(path)


def test_hosts_are_limited_and_filtered_as_deepspeed_does() -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    pool = {"node-0": 8, "node-1": 8}
    for include, exclude in [("node-1", ""), ("node-0@node-1:0,2", ""), ("", "node-1:0"), ("", "node-0")]:
        expected = runner.parse_inclusion_exclusion(dict(pool), include, exclude)
        options = LaunchOptions(
            hostfile="recipes/2nodes.hostfile", include=include or None, exclude=exclude or None
        )
        assert resolve_hosts(options, "cpu", 0, 1) == {host: tuple(slots) for host, slots in expected.items()}
    limited = LaunchOptions(hostfile="recipes/2nodes.hostfile", num_nodes=1, num_ranks=2)
    assert resolve_hosts(limited, "cpu", 0, 1) == {"node-0": (0, 1)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_ranks": 9}, "node-0 has 8 slots"),
        ({"num_nodes": 3}, "names 2 host"),
        ({"include": "node-7"}, "no host node-7"),
        ({"include": "node-0:8"}, "no slot 8"),
        ({"include": "node-0:a"}, "not of the form"),
        ({"exclude": "node-0@node-1"}, "leaves no slot"),
        ({"include": "node-0", "exclude": "node-1"}, "cannot be combined"),
    ],
)
def test_hosts_that_do_not_exist(options: dict[str, JsonValue], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve_hosts(LaunchOptions(hostfile="recipes/2nodes.hostfile", **options), "cpu", 0, 1)  # type: ignore[arg-type]


def test_more_ranks_than_devices() -> None:
    with pytest.raises(ValueError, match="8 ranks are asked for, but this machine has 4 cuda"):
        resolve_hosts(LaunchOptions(num_ranks=8), "cuda", 4, 1)
    assert resolve_hosts(LaunchOptions(), "cuda", 4, 2) == {"localhost": (0, 1)}


def quickstart(output_dir: Path) -> Recipe:
    return load_recipe("recipes/quickstart.yaml", [f"output_dir={output_dir}"])


def test_single_machine_command(tmp_path: Path) -> None:
    plan = plan_launch(
        LaunchOptions(), {"localhost": (0, 1, 2, 3)}, "cpu", quickstart(tmp_path), "step-000004", {}
    )
    assert plan.world_size == 4
    assert plan.environment["DS_ACCELERATOR"] == "cpu"
    assert int(plan.environment["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 4)
    assert {"--num_gpus=4", "--module", "--resume=step-000004"} <= set(plan.command)
    assert plan.exported is None
    # The flags mean to DeepSpeed what they are meant to.
    runner = pytest.importorskip("deepspeed.launcher.runner")
    parsed = runner.parse_args(list(plan.command[3:]))
    assert (parsed.num_gpus, parsed.module, parsed.no_local_rank) == (4, True, True)
    assert parsed.user_script == "eagle3_ds.launch.supervisor"
    logs, limit, *rank = parsed.user_args
    assert (logs, limit) == (f"--log_folder={tmp_path / 'logs'}", "--limit=600.0")
    assert rank == [
        "eagle3_ds.train.main",
        f"--recipe={tmp_path / 'recipe.resolved.yaml'}",
        "--resume=step-000004",
    ]
    assert runner.fetch_hostfile(parsed.hostfile) is None


def test_environment_reaches_the_other_hosts(tmp_path: Path) -> None:
    environ = {
        "NCCL_IB_HCA": "mlx5",
        "HF_HOME": "/data/hf",
        "HF_TOKEN": "secret",
        "EDITOR": "vi",
        "GLOO_SOCKET_IFNAME": "",
    }
    options = LaunchOptions(hostfile="recipes/2nodes.hostfile", launcher="openmpi", master_port=29501)
    plan = plan_launch(
        options, {"node-0": (0, 1), "node-1": (0, 1)}, "cuda", quickstart(tmp_path), None, environ
    )
    write_environment_file(plan)
    lines = Path(plan.environment["DS_ENV_FILE"]).read_text().splitlines()
    assert "NCCL_IB_HCA=mlx5" in lines and "HF_HOME=/data/hf" in lines
    assert "MASTER_ADDR=node-0" in lines and "MASTER_PORT=29501" in lines
    assert not [line for line in lines if "secret" in line or "EDITOR" in line or line.endswith("=")]
    with pytest.raises(ValueError, match="NCCL_X"):
        plan_launch(options, plan.hosts, "cuda", quickstart(tmp_path), None, {"NCCL_X": "a\nb"})


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = quickstart(tmp_path)
    options = LaunchOptions(
        hostfile="recipes/2nodes.hostfile", launcher="slurm", num_ranks=4, master_port=29501
    )
    hosts = resolve_hosts(options, "cuda", 0, 1)
    plan = plan_launch(
        options, hosts, "cuda", recipe, "step-000010", {"NCCL_IB_HCA": "mlx5_0,mlx5_1", "PATH": "/bin"}
    )
    command = started(plan, monkeypatch, may_ask=False)
    assert command[:3] == ["srun", "-n", "8"] and command[command.index("--gpus-per-node") + 1] == "4"
    (export,) = (argument for argument in command if argument.startswith("--export="))
    assert export.startswith("--export=ALL,") and "MASTER_ADDR=node-0,MASTER_PORT=29501" in export
    # It would become two variables there; srun hands it over whole.
    assert "mlx5" not in export
    python, unbuffered, supervisor, *arguments = command[command.index(export) + 1 :]
    assert (python, unbuffered, Path(supervisor).is_file()) == (sys.executable, "-u", True)
    assert arguments == [
        f"--log_folder={tmp_path / 'logs'}", "--limit=600.0", "eagle3_ds.train.main",
        f"--recipe={tmp_path / 'recipe.resolved.yaml'}", "--resume=step-000010",
    ]  # fmt: skip


def test_torchrun(tmp_path: Path) -> None:
    """The options mean to torch what they are meant to."""
    from torch.distributed.run import parse_args

    plan = plan_launch(
        LaunchOptions(launcher="torchrun"), {"localhost": (0, 1)}, "cpu", quickstart(tmp_path), None, {}
    )
    parsed = parse_args(list(plan.command[3:]))
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.module) == ("1", "2", True)
    assert parsed.training_script == "eagle3_ds.launch.supervisor"
    assert parsed.training_script_args[2] == "eagle3_ds.train.main"


def test_free_ports_are_ports() -> None:
    assert 1024 <= free_port() < 65536


# Report and shell


def test_report_of_a_run_and_of_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("report", "recipes/quickstart.yaml", f"output_dir={tmp_path}")
    assert "has no metrics.jsonl" in refusal(capsys, *command)
    records = [{"step": step, "loss": 9.0 / step, "step_accuracy": [0.5, 0.25]} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert main(command) == 0
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_stages_that_need_a_trained_draft(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, command, "recipes/quickstart.yaml", f"output_dir={tmp_path}")
    assert "no draft-final.safetensors" in message


def test_help_has_an_example_for_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--help"]) == 0
    options = capsys.readouterr().out
    shell = subprocess.run(["bash", "launch.sh", "--help"], capture_output=True, text=True, check=True).stdout
    for option in ("hostfile", "num_gpus", "num_ranks", "num_nodes", "include", "exclude", "master_addr",
                   "master_port", "launcher", "ds_config", "dry-run", "resume", "max-restarts",
                   "overwrite"):  # fmt: skip
        assert f"--{option}" in options and f"--{option}" in shell
    assert "--no-install" in shell
    assert main([]) == 2 and main(["--help"]) == 0 and main(["lunch"]) == 2


@pytest.mark.parametrize("command", ["launch", "capture"])
def test_the_shell_tells_every_option_of_the_commands_that_start_ranks(command: str) -> None:
    shell = subprocess.run(["bash", "launch.sh", "--help"], capture_output=True, text=True, check=True).stdout
    names = [name for option in commands.commands[command].params for name in option.opts if name[0] == "-"]
    assert len(names) > 9
    assert [name for name in names if name not in shell] == []


def test_the_shell_looks_for_every_package_that_is_required() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    required = re.findall(r'^  "([a-z]+)>=', text.partition("dependencies = [")[2].partition("\n]")[0], re.M)
    shell = (ROOT / "launch.sh").read_text()
    assert "click" in required
    for name in required:
        assert f'"{"yaml" if name == "pyyaml" else name}"' in shell


def every_command() -> list[tuple[str, ...]]:
    groups = {name: getattr(command, "commands", {}) for name, command in commands.commands.items()}
    return [
        (),
        *((name,) for name in groups),
        *((name, action) for name in groups for action in groups[name]),
    ]


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_every_command_tells_all_its_options(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    command: click.Command = commands
    for word in words:
        assert isinstance(command, click.Group)
        command = command.commands[word]
    assert main([*words, "--help"]) == 0
    told = capsys.readouterr().out
    for option in command.params:
        assert all(name in told for name in option.opts if name[0] == "-")
        assert not isinstance(option, click.Option) or option.help
    if isinstance(command, click.Group):
        assert all(f"  {name} " in told for name in command.commands)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("docter",),
            "eagle3-ds: there is no command 'docter'. Did you mean doctor? Commands: init, launch, prepare, ",
        ),
        (("store", "verfy"), "eagle3-ds store: there is no action 'verfy'. Did you mean verify? Actions: "),
        (("launch",), "eagle3-ds launch: Missing argument 'RECIPE'."),
        (("launch", "x.yaml", "--num-gpus", "2"), "eagle3-ds launch: No such option"),
        (("plan", "x.yaml", "--gpus", "0"), "eagle3-ds plan: Invalid value for '--gpus': 0"),
        (("export", "nowhere.yaml"), "eagle3-ds export: "),
    ],
)
def test_a_mistake_is_one_message(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refusal(capsys, *words)
    assert told.startswith(message) and "Traceback" not in told and told.count("\n") == 1


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eagle3_ds.cli.words.read_recipe", interrupt)
    assert main(["report", "recipes/quickstart.yaml"]) == 130
    assert capsys.readouterr().err.strip() == "eagle3-ds report: interrupted"


def test_help_waits_for_nothing_heavy() -> None:
    code = (
        "import sys; from eagle3_ds.cli.main import main; main(['launch', '--help']); "
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'rich.console'}; "
        "sys.exit(', '.join(heavy & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_the_log_level_reaches_the_ranks_by_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["launch", "recipes/quickstart.yaml", "--dry-run", f"output_dir={tmp_path / 'run'}"]
    assert main([*where, "--log-level", "warning"]) == 0
    assert "logging:\n  level: warning" in capsys.readouterr().out
    assert main(where) == 0
    assert "logging:\n  level: info" in capsys.readouterr().out
    assert "--log-level" in refusal(capsys, *where, "--log-level", "loud")


def test_no_install_refuses_with_the_command(tmp_path: Path) -> None:
    copy = tmp_path / "launch.sh"
    copy.write_text((ROOT / "launch.sh").read_text())
    # A Python without the dependencies: -S leaves site-packages out.
    for name in ("python3", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", str(copy), "x.yaml", "--no-install"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert "--no-install was given" in done.stderr and "-m pip install" in done.stderr
    assert f"-c {tmp_path}/constraints.txt -e {tmp_path}[dev]" in done.stderr
    assert not (tmp_path / ".venv").exists()
