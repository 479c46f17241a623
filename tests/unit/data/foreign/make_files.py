"""Makes the files in this folder by the writers of SpecForge and speculators themselves; README.md tells the
commands.

What a server would have computed comes from transformers, in bfloat16; everything after that is the packages'
own code. Not run by the tests: it needs an environment with the package whose files it makes.
"""

import argparse
import asyncio
import importlib.abc
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

HERE = Path(__file__).parent
LENGTHS = (12, 20, 9, 16)


def make_target(folder):
    """A random Llama of 8 layers whose layers matter, with a tokenizer of 64 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(
        vocab_size=64, num_hidden_layers=8, max_position_embeddings=128, initializer_range=0.3, **sizes
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(0.5, 2.0, 16))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)


def samples():
    """(token ids, loss mask) of four conversations of one or two turns."""
    generator = torch.Generator().manual_seed(1)
    for length in LENGTHS:
        token_ids = torch.randint(2, 64, (length,), generator=generator)
        loss_mask = torch.zeros(length, dtype=torch.int64)
        loss_mask[length // 3 : length // 2] = 1
        loss_mask[2 * length // 3 :] = 1
        yield token_ids, loss_mask


@torch.no_grad()
def run_target(folder, token_ids):
    """Inputs of all layers and the output of the last, before and after the final norm: [L, H] each,
    bfloat16.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    before_norm = []
    model.model.norm.register_forward_pre_hook(lambda _module, inputs: before_norm.append(inputs[0][0]))
    *inputs, normed = model.model(token_ids[None], output_hidden_states=True).hidden_states
    return [hidden[0] for hidden in inputs], before_norm[0], normed[0]


def load_script(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_specforge(script, out, compress):
    """`scripts/prepare_hidden_states.py`: its generator, data loader and batches of two, so that files hold
    padding.
    """
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    os.environ["SPECFORGE_DEVICE"] = "cpu"
    from datasets import Dataset
    from specforge.data.utils import prepare_dp_dataloaders
    from specforge.distributed import destroy_distributed, get_dp_group, init_distributed

    module = load_script(script)
    init_distributed(tp_size=1)
    rows = [
        {"input_ids": ids[None], "loss_mask": mask[None], "attention_mask": torch.ones_like(mask)[None]}
        for ids, mask in samples()
    ]
    dataset = Dataset.from_list(
        [{name: value.tolist() for name, value in row.items()} for row in rows]
    ).with_format("torch")
    loader = prepare_dp_dataloaders(dataset, 2, num_workers=0, process_group=get_dp_group(), shuffle=False)
    on_cpu = mock.patch.object(torch, "tensor", tensor_on_cpu(torch.tensor))
    uncopied = mock.patch.object(torch.Tensor, "cuda", lambda self, **_: self)
    with (
        on_cpu,
        uncopied,
        module.HiddenStatesGenerator(SpecForgeCapture(), compress=compress, num_io_threads=1) as generator,
    ):
        generator.generate(loader, str(out), start_idx=0, samples_per_dp=len(rows))
    destroy_distributed()


def tensor_on_cpu(tensor):
    """torch.tensor that ignores `device`: the generator asks for CUDA."""

    def make(*args, device=None, **more):
        return tensor(*args, **more)

    return make


class SpecForgeCapture:
    """Stands for SGLang, which is asked for the outputs of layers 1, n // 2 - 1, n - 4 and takes the inputs
    of the next.
    """

    def capture(self, input_ids, attention_mask, loss_mask):
        aux, last = [], []
        for row in input_ids:
            inputs, _, normed = run_target(HERE / "target", row)
            aux.append(
                torch.cat([inputs[layer + 1] for layer in (1, len(inputs) // 2 - 1, len(inputs) - 4)], dim=-1)
            )
            last.append(normed)
        return SimpleNamespace(hidden_states=torch.stack(aux), last_hidden_states=torch.stack(last))


def make_speculators(out):
    """`speculators prepare-data` and `speculators generate-offline-data`, the latter against a stand-in for
    vLLM.
    """
    from speculators.cli.generate_offline_data import _generate_and_save_hidden_states
    from speculators.cli.prepare_data import prepare_data

    rows = [{"input_ids": ids.tolist(), "loss_mask": mask.tolist()} for ids, mask in samples()]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare_data(
            model=str(HERE / "target"), data=[str(data)], output=str(out), num_preprocessing_workers=1
        )
        server = ThreadingHTTPServer(("127.0.0.1", 0), vllm_handler(Path(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = {
            "request_timeout": 60,
            "max_retries": 0,
            "fail_on_error": True,
            "max_consecutive_errors": None,
        }
        asyncio.run(
            _generate_and_save_hidden_states(
                model=None,
                endpoint=f"http://127.0.0.1:{server.server_port}/v1",
                preprocessed_data=str(out),
                output=None,
                max_samples=None,
                concurrency=1,
                validate_outputs=True,
                world_size=1,
                rank=0,
                **options,
            )
        )
        server.shutdown()


def vllm_handler(folder):
    """Answers as vLLM with its ExampleHiddenStatesConnector does, asked for layers 2, n // 2, n - 3 and n by
    launch_vllm.py.
    """
    from safetensors.torch import save_file

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, body):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self):  # noqa: N802
            self.answer(
                {
                    "object": "list",
                    "data": [{"id": "target", "object": "model", "created": 0, "owned_by": "x"}],
                }
            )

        def do_POST(self):  # noqa: N802
            token_ids = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
            inputs, before_norm, _ = run_target(HERE / "target", torch.tensor(token_ids))
            layers = [inputs[layer] for layer in (2, len(inputs) // 2, len(inputs) - 3)]
            path = folder / f"{abs(hash(tuple(token_ids)))}.safetensors"
            save_file(
                {
                    "hidden_states": torch.stack([*layers, before_norm], dim=1),
                    "token_ids": torch.tensor(token_ids),
                },
                path,
            )
            choice = {
                "index": 0,
                "text": "",
                "finish_reason": "length",
                "logprobs": None,
                "prompt_token_ids": token_ids,
            }
            answer = {
                "id": "x",
                "object": "text_completion",
                "created": 0,
                "model": "target",
                "choices": [choice],
            }
            self.answer(answer | {"kv_transfer_params": {"hidden_states_path": str(path)}})

    return Handler


class AnyVllm(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for the module vllm and all that it holds: only its version is used."""

    def find_spec(self, name, path=None, target=None):
        return (
            importlib.util.spec_from_loader(name, self, is_package=True)
            if name.split(".")[0] == "vllm"
            else None
        )

    def create_module(self, spec):
        return mock.MagicMock(name=spec.name, __version__="none", __path__=[], __spec__=spec)

    def exec_module(self, module):
        pass


def make_speculators_04(script, out):
    """speculators 0.4: `scripts/data_generation_offline.py`, with a stand-in for its generator on vLLM."""
    sys.meta_path.insert(0, AnyVllm())
    module = load_script(script)
    module.VllmHiddenStatesGenerator = SpeculatorsGenerator
    ids, masks = zip(*samples(), strict=True)
    dataset = SliceableRows({"input_ids": ids, "loss_mask": masks})
    options: dict[str, object] = {
        "layer_ids": None,
        "gpu_memory_utilization": 0.8,
        "tensor_parallel_size": 1,
        "batch_size": 3,
        "start_idx": 0,
    }
    options |= {
        "hf_cache_dir": None,
        "train_data_path": "rows.jsonl",
        "seq_length": 2048,
        "max_samples": None,
        "seed": 0,
    }
    options |= {
        "target_model_path": str(HERE / "target"),
        "output_dir": str(out),
        "max_num_batched_tokens": None,
    }
    sys.argv = ["data_generation_offline.py"]
    module.generate_and_save_hidden_states(argparse.Namespace(**options), dataset)
    shutil.copy(out / "data_config.json", out / "copy")
    config = json.loads((out / "copy").read_text())
    config["model"]["target_model_path"] = "target"
    config["generation"]["cache_dir"] = "cache"
    (out / "data_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "copy").unlink()


class SliceableRows(dict):
    """Columns that are sliced together, as a data set is."""

    def __len__(self):
        return len(self["input_ids"])

    def __getitem__(self, key):
        return (
            {name: column[key] for name, column in self.items()}
            if isinstance(key, slice)
            else super().__getitem__(key)
        )


class SpeculatorsGenerator:
    """Its custom worker adds a layer's output to the list where the layer's number is among these."""

    def __init__(self, model_path, tensor_parallel_size, **_):
        self.model_path, self.tensor_parallel_size = model_path, tensor_parallel_size
        self.layer_ids = [2, 4, 5, 7]
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(gpu_memory_utilization=0.8))

    def generate(self, token_ids):
        results = []
        for ids in token_ids:
            inputs, before_norm, _ = run_target(HERE / "target", ids)
            outputs = [*inputs[1:], before_norm]
            results.append(
                {
                    "input_ids": ids,
                    "hidden_states": [outputs[layer] for layer in self.layer_ids],
                    "loss_mask": None,
                }
            )
        return results


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["target", "specforge", "speculators", "speculators-0.4"])
    parser.add_argument(
        "--script", help="SpecForge's prepare_hidden_states.py, speculators 0.4's data_generation_offline.py"
    )
    options = parser.parse_args()
    out = HERE / options.what
    shutil.rmtree(out, ignore_errors=True)
    if options.what == "target":
        make_target(out)
    elif options.what == "specforge":
        make_specforge(options.script, out, compress=False)
        shutil.rmtree(HERE / "specforge-gz", ignore_errors=True)
        make_specforge(options.script, HERE / "specforge-gz", compress=True)
    elif options.what == "speculators":
        make_speculators(out)
    else:
        make_speculators_04(options.script, out)


if __name__ == "__main__":
    main()
