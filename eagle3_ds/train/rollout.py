"""Training on hidden states that the caller supplies, for example from the rollout engine of an RL loop.

Legend: L tokens of a packed sequence, Ht hidden size of the target, V its vocabulary.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.checkpoint.format import folder_name, let_others_read
from eagle3_ds.checkpoint.restore import load_checkpoint
from eagle3_ds.checkpoint.saver import CheckpointSaver, Progress
from eagle3_ds.config import Recipe, fill_deepspeed_config, load_deepspeed_config, load_recipe
from eagle3_ds.draft import VocabularyMap, aux_size, has_own_embedding
from eagle3_ds.export import vllm_tensors
from eagle3_ds.layout import PackedSequence
from eagle3_ds.serving.client import ServerClient
from eagle3_ds.serving.draft_loader import DRAFT_FORMAT
from eagle3_ds.targets import (
    fold_factor,
    load_embedding_and_head,
    load_full_config,
    logits_factor,
    resolve_path,
)
from eagle3_ds.topology import Topology, maybe_setup_distributed
from eagle3_ds.train.device_memory import SleepingMemory, tensors_of
from eagle3_ds.train.initial_draft import load_initial_draft
from eagle3_ds.train.rollout_inputs import (
    AnyRollout,
    ServedRollout,
    Texts,
    check_tokens,
    draft_vocabulary,
)
from eagle3_ds.train.rollout_packs import RolloutPacks
from eagle3_ds.train.state import EngineState
from eagle3_ds.train.trainer import DraftTrainer, StepReport
from eagle3_ds.train.trigger import steps_in

STEP_TIMES = 5
"""Of how many steps, the last ones, the longest says how long the next will take."""


class RolloutTrainer:
    """A `DraftTrainer` that takes `Rollout`s instead of a recipe's data.

    The constructor and every method are collective over the world: all ranks call them in the same order, the
    ranks of one sp group with the same rollouts. Without a launcher the world is this one process.

    Args:
        recipe: a recipe, or the path of one. Of its sections `data` and `eval`, which it need not have,
            `data.max_length` alone is used: the longest sequence that memory is planned for.
        overrides: for a path: `section.key=value`, as on the command line.
        vocabulary: the draft vocabulary; or how often each of the target's tokens was answered, int64 [V],
            of which the `draft.vocab_size` most frequent ones are taken; or the path of a file that a run
            has written (vocabulary.safetensors). None takes that of `train.init_from`, or else of
            vocabulary.safetensors in `output_dir`; without that file, the draft has all tokens if
            `draft.vocab_size` equals the target's.
        weights: whole weights of a draft to continue from, named as in `state_dict`. None reads those of
            `train.init_from`, or starts a new draft.

    Raises:
        ValueError: the recipe has a mistake, `train.init_from` cannot be used, or no vocabulary was found.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path,
        overrides: Sequence[str] = (),
        vocabulary: VocabularyMap | Tensor | str | Path | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
        _check_start_and_anchors(self.recipe)
        folder = resolve_path(self.recipe.target.path)
        full_config = load_full_config(folder)
        config = full_config.get_text_config()
        self._logits_factor = logits_factor(full_config, self.recipe.target.path)
        if self.recipe.train.init_from is not None:
            initial, own = load_initial_draft(self.recipe)
            weights = initial if weights is None else weights
            vocabulary = own if vocabulary is None else vocabulary
        self.vocabulary = draft_vocabulary(self.recipe, vocabulary, config.vocab_size)
        topology = _topology(self.recipe)
        torch.manual_seed(self.recipe.train.seed)
        algorithm = algorithm_of(self.recipe)
        draft_config = algorithm.build_config(config, self.recipe)
        if has_own_embedding(draft_config):
            raise ValueError(
                f"draft.hidden_size is {draft_config.hidden_size}, the target's {config.hidden_size}: beside "
                "a target that goes on training a draft shares its embedding, which needs the same width. "
                "Set it to null."
            )
        draft = algorithm.build(draft_config)
        if weights is not None:
            draft.load_state_dict(dict(weights))
        embedding, head = load_embedding_and_head(folder)
        if weights is None:
            draft.start_from(embedding)
        # A copy: on a CPU it would stay a mapped file, whose memory `sleep` could not give back.
        embedding = embedding.to(topology.device, getattr(torch, self.recipe.train.dtype), copy=True)
        user = load_deepspeed_config(self.recipe.deepspeed)
        settings = fill_deepspeed_config(user, self.recipe, topology.mesh.world_size, topology.draft_dp)
        self._asked = 0
        self._step_seconds: deque[float] = deque(maxlen=STEP_TIMES)
        self._sleeping: SleepingMemory | None = None
        self.trainer = DraftTrainer(self.recipe, settings, topology, draft, embedding, head, self.vocabulary)
        self._packer = RolloutPacks(
            self.recipe, topology, self.trainer.supervision, folder, config, head, aux_size(draft.config)
        )
        self.steps = 0

    def step(
        self, rollouts: AnyRollout | Sequence[AnyRollout], learning_rate: float | None = None
    ) -> StepReport:
        """Take one optimizer step. Collective.

        Args:
            rollouts: `train.accumulation` of them, those of this draft_dp rank.
            learning_rate: of this step; None keeps the last one.

        Raises:
            ValueError: this rank or another got a rollout that cannot be trained on; no rank takes the step.
        """
        self._require_awake()
        start = time.monotonic()
        given = [rollouts] if isinstance(rollouts, Texts) else list(rollouts)
        report = self.trainer.step(self._packs(given, self.recipe.train.accumulation), learning_rate)
        self.steps += 1
        self._step_seconds.append(time.monotonic() - start)
        return report

    def train_for(
        self,
        seconds: float,
        rollouts: Sequence[AnyRollout | Sequence[AnyRollout]],
        learning_rate: float | None = None,
    ) -> list[StepReport]:
        """Take as many whole steps as fit into a time, for example while the policy waits for its rewards.
        Collective: all ranks take equally many, the fewest that a rank has time and rollouts for.

        How long a step takes is the longest of the last `STEP_TIMES` steps; where none was taken yet, the
        first one of these measures it. The ranks agree once; in that case once more, before that step.

        Args:
            seconds: from now. A step that takes longer than those before it may end later.
            rollouts: what each step gets, as in `step`, in this order.
            learning_rate: of these steps; None keeps the last one.

        Returns:
            The reports of the steps taken, of which there may be none: len() says how many rollouts are done.

        Raises:
            ValueError: as `step`. The steps before it are taken.
        """
        self._require_awake()
        deadline, reports = time.monotonic() + seconds, list[StepReport]()

        def take(number: int) -> None:
            following = rollouts[len(reports) : len(reports) + self._fewest(number)]
            reports.extend(self.step(each, learning_rate) for each in following)

        if not self._step_seconds:
            take(min(1, len(rollouts)) if seconds > 0 else 0)
        take(steps_in(deadline - time.monotonic(), self._step_seconds, len(rollouts) - len(reports)))
        return reports

    def sleep(self) -> int:
        """Give the device memory of the draft, its optimizer and the target's frozen tensors back, for
        example to the rollout engine; what they hold goes to host memory. `wake` takes it again. Not
        collective, but no method of a trainer that sleeps may be called on any rank.

        Returns:
            The bytes of this rank's device that were given back; 0 when it sleeps already.
        """
        if self._sleeping is not None:
            return 0
        trainer = self.trainer
        roots = (trainer.engine, trainer.frozen_tensors(), trainer.draft_to_target)
        tensors = tensors_of(*roots, self._packer.device_tensors())
        self._sleeping = SleepingMemory(tensors, trainer.topology.device)
        return self._sleeping.num_bytes

    def wake(self) -> None:
        """Take the device memory again: everything is as it was, to the bit. Not collective."""
        if self._sleeping is not None:
            self._sleeping.wake()
            self._sleeping = None

    def evaluate(self, rollouts: Sequence[AnyRollout]) -> StepReport:
        """Loss and accuracy over the rollouts of all draft_dp ranks; each rank passes its own, equally many.
        Collective.

        Raises:
            ValueError: this rank or another got a rollout that cannot be evaluated.
        """
        self._require_awake()
        return self.trainer.evaluate(self._packs(rollouts, len(rollouts)))

    def update_target(
        self, embedding: Tensor, head: Tensor, norm: Mapping[str, Tensor] | None = None
    ) -> None:
        """Replace the target's embedding [V, H] and head [V, Ht], for example after the policy was updated.

        Args:
            embedding, head: whole, the same on every rank, as the target's model holds them: a constant
                factor of its logits is applied here.
            norm: the `state_dict` of its final norm. Rows of a server are those before that norm, so that
                `ServedRollout`s are refused after an update without it.

        Raises:
            ValueError: a shape differs from the target's.
        """
        self._require_awake()
        for name, tensor in (("embedding", embedding), ("head", head)):
            if tensor.shape != self._packer.head.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, the target's is "
                    f"{tuple(self._packer.head.shape)}"
                )
        head = fold_factor(head.detach(), self._logits_factor)
        self.trainer.update_target(embedding, head)
        self._packer.use_target(head.cpu().clone(), norm)

    def connect(
        self,
        url: str,
        folder: str | Path,
        name: str = "rollout",
        timeout: float = 600.0,
        retries: int = 3,
        key_variable: str | None = None,
    ) -> ServerClient:
        """A client of the rollout engine, for `ask`. Collective: the first rank of each sp group connects.

        Args:
            url: of a vLLM server that was started with our connector, or with vLLM's own
                (docs/hidden-states.md).
            folder: where its connector writes; every rank must see it.
            name: how the names of this trainer's files begin: letters, digits and dashes. Files with such
                names that were left there are removed.
            timeout: seconds for one try of one document.
            retries: how often a document is tried again.
            key_variable: the environment variable that holds the server's API key.

        Raises:
            ValueError: no server answers, or it is none of vLLM's. On every rank.
        """
        topology, mistake = self.trainer.topology, None
        prefix = f"{name}-{topology.place.dp_rank}"
        client = ServerClient(
            url, Path(folder), prefix, timeout, retries, key_variable, warns=topology.place.dp_rank == 0
        )
        try:
            if topology.sp_rank == 0:
                client.connect()
        except ValueError as error:
            mistake = error
        self._agree(mistake, "could not connect to the server and say why")
        return client

    def ask(self, client: ServerClient, texts: Texts, concurrency: int = 4) -> ServedRollout:
        """Have the server write the hidden states of documents. Collective: the first rank of each sp group
        asks, `concurrency` documents at a time; all its ranks get the paths of the files.

        Raises:
            ValueError: the server failed, or gave other rows than those of a document. On every rank.
        """
        self._require_awake()
        folder, turn, mistake = client.folder, self._asked, None
        files = tuple(
            folder / f"{client.prefix}-text-{turn}-{i}.safetensors" for i in range(len(texts.lengths))
        )
        self._asked += 1
        try:
            check_tokens(texts, len(self._packer.head))
            if self.trainer.topology.sp_rank == 0:
                documents = texts.token_ids.cpu().split(list(texts.lengths))
                expected = self._packer.expected()
                with ThreadPoolExecutor(concurrency, thread_name_prefix="rollout") as threads:
                    asked = [
                        threads.submit(client.file, document.tolist(), expected, file)
                        for document, file in zip(documents, files, strict=True)
                    ]
                for future in asked:
                    future.result()
        except ValueError as error:
            mistake = error
        self._agree(mistake, "got no rows from the server and say why")
        return ServedRollout(texts.token_ids, texts.loss_mask, texts.lengths, files)

    def discard(self, rollout: ServedRollout) -> None:
        """Remove the files of a rollout, after the `step` or `evaluate` that used it. Not collective: the
        first rank of the sp group removes them; all its ranks have read theirs when a step returns.
        """
        if self.trainer.topology.sp_rank == 0:
            for file in rollout.files:
                file.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The draft's whole weights on the CPU of every rank. Collective. `export.vllm_tensors` renames them
        to the names that servers load.
        """
        self._require_awake()
        return self.trainer.state_dict()

    def write_draft(self, folder: str | Path, version: int, dtype: str | None = None) -> Path:
        """Write the draft to a file that a running vLLM takes over (`serving.draft_loader`, docs/rl.md).
        Collective; the first rank alone holds the whole draft, and writes it.

        Args:
            folder: on a disk that the server's workers see.
            version: a number that rises from draft to draft.
            dtype: of the weights; None: `export.dtype`.

        Returns:
            The file's path, on every rank, once it is complete.

        Raises:
            ValueError: the version is negative, or the file could not be written. On every rank.
        """
        self._require_awake()
        if version < 0:
            raise ValueError(f"version is {version}: number the drafts from 0 or more, and rising")
        first, mistake = self.trainer.topology.place.rank == 0, None
        path = Path(folder) / f"draft-{version}.safetensors"
        state = self.trainer.state_dict(keep=first)
        try:
            if first:
                about = {"format": DRAFT_FORMAT, "version": str(version)}
                trainer = self.trainer
                form, config = trainer.algorithm.layouts["vllm"], trainer.draft.config
                tensors = vllm_tensors(
                    state,
                    self.vocabulary,
                    dtype or self.recipe.export.dtype,
                    self.recipe.draft.algorithm,
                    config,
                    trainer.engine.module.frozen[0] if form.brings_embedding(config) else None,
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                aside = path.with_name(f".{path.name}.part")
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, about)
                let_others_read(aside)
                aside.replace(path)
        except (OSError, SafetensorError) as error:
            mistake = ValueError(f"{path} could not be written: {error}")
        self._agree(mistake, "could not write the draft and say why")
        return path

    def save(self, folder: str | Path) -> Path:
        """Write a checkpoint, optimizer state included, into a new folder under `folder`. Collective.

        Returns:
            The checkpoint's own folder, for `load`.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        self._require_awake()
        saver = CheckpointSaver(EngineState(self.trainer), Path(folder))
        packs = self.steps * self.recipe.train.accumulation * self.trainer.topology.draft_dp
        saver.save(Progress(self.steps, packs))
        saver.finish()
        return Path(folder) / folder_name(self.steps)

    def load(self, folder: str | Path) -> int:
        """Continue from a checkpoint that `save` wrote, on any mesh and at any ZeRO stage. Collective.

        Returns:
            The optimizer steps that the checkpoint has done.

        Raises:
            ValueError: the checkpoint is missing, damaged, or of another draft.
        """
        self._require_awake()
        self.steps = load_checkpoint(EngineState(self.trainer), Path(folder)).step
        return self.steps

    def _packs(self, rollouts: Sequence[AnyRollout], number: int) -> list[PackedSequence]:
        """Turn rollouts into packs. Collective: a mistake on one rank is raised on all, because the others
        would wait for ever in the collectives of a step that this rank does not take.
        """
        packs, mistake = [], None
        try:
            if len(rollouts) != number:
                raise ValueError(
                    f"step() got {len(rollouts)} rollouts, and train.accumulation is {number}: give exactly "
                    "that many"
                )
            packs = [self._packer.pack(rollout) for rollout in rollouts]
        except ValueError as error:
            mistake = error
        self._agree(mistake, "refused their rollouts and say why: no rank takes this step")
        return packs

    def _require_awake(self) -> None:
        """Raises ValueError while the trainer sleeps; its tensors are empty then."""
        if self._sleeping is not None:
            raise ValueError("the trainer sleeps, its device memory is given back: call wake() first")

    def _fewest(self, number: int) -> int:
        """The smallest of all ranks' numbers. Collective over the world."""
        fewest = torch.tensor([number], dtype=torch.int64, device=self.trainer.topology.device)
        dist.all_reduce(fewest, op=dist.ReduceOp.MIN)
        return int(fewest)

    def _agree(self, mistake: ValueError | None, what: str) -> None:
        """Raise this rank's mistake, or that of another. Collective over the world."""
        wrong = torch.tensor([mistake is not None], dtype=torch.int32, device=self.trainer.topology.device)
        dist.all_reduce(wrong)
        if mistake is not None:
            raise mistake
        if wrong.item():
            raise ValueError(f"{wrong.item()} other rank(s) {what}")


def _check_start_and_anchors(recipe: Recipe) -> None:
    """Raises ValueError where the recipe draws anchors, which the loader of documents does by their ids, or
    begins with a text, of which there is none yet.
    """
    if recipe.draft.start == "lookup":
        raise ValueError(
            "draft.start is 'lookup', which reads the first text of a data set before the first step; "
            "rollouts come later. Set it to random, or name a draft that began so in train.init_from."
        )
    if algorithm_of(recipe).anchors(recipe) is not None:
        raise ValueError(
            f"draft.anchor_share is {recipe.draft.anchor_share}: anchors are drawn by document and epoch, "
            "and rollouts have neither. Set it to 1.0, which makes every slot that can be one an anchor."
        )


def _topology(recipe: Recipe) -> Topology:
    parallel = recipe.parallel
    topology = maybe_setup_distributed(parallel.ulysses, parallel.ring, parallel.draft_dp)
    if not dist.is_initialized():
        # Without a launcher DeepSpeed still needs a process group and LOCAL_RANK. A HashStore needs no
        # address or port.
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    return topology
