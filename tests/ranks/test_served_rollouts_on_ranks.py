"""Rows of rollouts from a server: the same steps, to the bit, as with the same rows handed in as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from eagle3_ds.config import Recipe, TargetSection
from eagle3_ds.targets import load_target, load_text_config
from eagle3_ds.targets.end import load_target_end
from eagle3_ds.train.rollout import RolloutTrainer
from eagle3_ds.train.rollout_inputs import Rollout, ServedRollout, Texts
from tests.ranks.test_rollout_on_ranks import LENGTHS, make_recipe
from tests.ranks.test_rollout_on_ranks import target as target
from tests.unit.fake_server import FakeServer
from tests.unit.served_target import server_of_target

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def server(target: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with server_of_target(Path(target), tmp_path_factory.mktemp("rows")).running() as fake:
        yield fake


def recipe_of(target: str, output: Path, ring: int, ulysses: int) -> Recipe:
    recipe = make_recipe(target, output, 1, ulysses, 2)
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"ring": ring})})


def texts() -> list[Texts]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for lengths in LENGTHS:
        tokens = torch.randint(0, 300, (sum(lengths),), generator=generator)
        found.append(Texts(tokens, torch.rand(sum(lengths), generator=generator) < 0.7, lengths))
    return found


def as_tensors(target: str, rollout: ServedRollout) -> Rollout:
    """The same rows, read whole and by other means, handed in as a loop does that holds them."""
    end = load_target_end(Path(target), load_text_config(Path(target)), torch.float32)
    hidden = []
    for path in rollout.files:
        with safe_open(path, framework="pt") as file:
            hidden.append(file.get_tensor("hidden_states"))
    whole = torch.cat(hidden)
    teacher = end.norm(whole[:, -1]).detach()
    return Rollout(
        rollout.token_ids, rollout.loss_mask, rollout.lengths, whole[:, :-1].flatten(1).clone(), teacher
    )


def train(trainer: RolloutTrainer, rollouts: list[Any]) -> list[Any]:
    reports = [trainer.step(rollouts) for _ in range(3)] + [trainer.evaluate(rollouts)]
    return [(report.loss, report.grad_norm, report.tau, report.tokens) for report in reports]


def both_ways(target: str, output: Path, ring: int, ulysses: int, url: str, folder: Path) -> Any:
    torch.set_num_threads(1)
    recipe = recipe_of(target, output, ring, ulysses)
    trainer = RolloutTrainer(recipe)
    client = trainer.connect(url, folder)
    served = [trainer.ask(client, text) for text in texts()]
    found = train(trainer, served)
    weights = trainer.state_dict()
    other = RolloutTrainer(recipe)
    expected = train(other, [as_tensors(target, rollout) for rollout in served])
    same = all(torch.equal(weights[name], weight) for name, weight in other.state_dict().items())
    torch.distributed.barrier()
    for rollout in served:
        trainer.discard(rollout)
    return found, expected, same


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (2, 2)])
def test_served_rows_train_as_tensors_do_to_the_bit(
    run_ranks: Any, target: str, server: FakeServer, tmp_path: Path, ring: int, ulysses: int
) -> None:
    asked = len(server.asked)
    ranks = run_ranks(ring * ulysses, both_ways, target, tmp_path, ring, ulysses, server.url, server.folder)
    for found, expected, same in ranks:
        assert found == expected and same
    losses = [step[0] for step in ranks[0][0][:3]]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[2]
    assert len(server.asked) - asked == sum(map(len, LENGTHS)), "each document is asked for once"
    assert not list(server.folder.iterdir()), "files were left"


def rows_read(target: str, output: Path, url: str, folder: Path) -> tuple[int, int]:
    """Rows of aux and of teacher that a rank of four holds, beside those of the sequence."""
    trainer = RolloutTrainer(recipe_of(target, output, 2, 2))
    client = trainer.connect(url, folder)
    served = trainer.ask(client, texts()[0])
    pack: Any = trainer._packer.pack(served)
    torch.distributed.barrier()
    trainer.discard(served)
    return len(pack.aux._rows), len(pack.teacher._rows)


def test_a_rank_holds_its_own_rows_and_no_others(
    run_ranks: Any, target: str, server: FakeServer, tmp_path: Path
) -> None:
    ranks = run_ranks(4, rows_read, target, tmp_path, server.url, server.folder)
    length = sum(LENGTHS[0])
    assert sum(aux for aux, _ in ranks) == length
    assert all(0 < teacher < length for _, teacher in ranks)


def mistakes(target: str, output: Path, url: str, folder: Path) -> dict[str, str]:
    """What each of two ranks is told, by what was wrong."""
    trainer = RolloutTrainer(recipe_of(target, output, 2, 1))
    said = {}

    def told(name: str, call: Any, *arguments: Any) -> None:
        with pytest.raises(ValueError) as error:
            call(*arguments)
        said[name] = str(error.value)

    told("nobody there", trainer.connect, "http://127.0.0.1:9", folder)
    client = trainer.connect(url, folder, retries=0)
    served = [trainer.ask(client, text) for text in texts()]
    told("files", trainer.step, [replace(served[0], files=served[0].files[:1]), served[1]])
    swapped = replace(served[0], files=served[0].files[::-1])
    told("order", trainer.step, [swapped, served[1]])
    model = load_target(TargetSection(path=target), dtype="float32")
    trainer.update_target(model.embedding, model.head)
    told("norm", trainer.step, served)
    norm = {"weight": model.base.norm.weight * 50}
    trainer.update_target(model.embedding, model.head, norm)
    doubled = trainer.evaluate(served).loss
    trainer.update_target(model.embedding, model.head, model.base.norm.state_dict())
    said["norm is used"] = str(abs(trainer.evaluate(served).loss - doubled) > 1e-4)
    torch.distributed.barrier()
    for rollout in served:
        trainer.discard(rollout)
    said["steps"] = str(trainer.steps)
    return said


def test_mistakes_are_told_on_all_ranks(
    run_ranks: Any, target: str, server: FakeServer, tmp_path: Path
) -> None:
    first, second = run_ranks(2, mistakes, target, tmp_path, server.url, server.folder)
    assert "cannot be reached" in first["nobody there"] and "1 other rank(s)" in second["nobody there"]
    for said in (first, second):
        assert "files has 1 paths for 2 documents" in said["files"]
        assert "the server gave rows for" in said["order"]
        assert "updated without its final norm" in said["norm"]
        assert said["norm is used"] == "True" and said["steps"] == "0"
