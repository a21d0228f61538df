"""``fastdaa doctor``: Shows versions, devices, and how a model would be trained, with reasons."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdaa.cli.kernel_search import search_kernels
from fastdaa.cli.plain_parser import PlainParser
from fastdaa.counted import counted

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# What the rest is for; without them everything else works.
_OPTIONAL = {
    "triton": "GPU kernels",
    "peft": "LoRA",
    "bitsandbytes": "LoRA on a base in 4 or 8 bits",
    "flash-attn": "attention over packed rows on CUDA",
    "liger-kernel": "layer kernels, benchmarks",
    "trl": "comparisons",
}


class Row(NamedTuple):
    """A line of the report."""

    name: str
    value: str
    ok: bool = True


def run(argv: Sequence[str]) -> int:
    """Prints the report; 1 if a required package is missing or too old, else 0."""
    parser = PlainParser(prog="fastdaa doctor", description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "--model", help="a local folder or a hub id, of which only the configuration is read"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with the model"
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="compile every Triton kernel for sm_80, sm_90 and sm_100 (no GPU needed; a minute or "
        "two) and print their registers, spills and shared memory",
    )
    parser.add_argument(
        "--search-kernels",
        metavar="N,V,D",
        help="time other tile shapes of the kernels for this problem on the CUDA device (up to "
        "three minutes), and say which way to scores is the fastest and how to have it; nothing "
        "is changed",
    )
    options = parser.parse_args(list(argv))
    # What follows may need what the first table finds missing.
    ok = [_print("versions", version_rows()), _print("devices", device_rows())]
    if options.model is not None:
        model = empty_model(options.model, options.trust_remote_code)
        rows = [*_adapter_rows(options.model), *model_rows(model)]
        ok.append(_print(f"model {options.model}", rows))
    if options.kernels:
        ok.append(_print("kernels", kernel_rows()))
    if options.search_kernels is not None:
        print(search_kernels(options.search_kernels))
    return 0 if all(ok) else 1


def version_rows() -> list[Row]:
    """fastdaa, Python, and every package that matters, required ones against their floors."""
    from fastdaa import __version__

    rows = [Row("fastdaa", __version__), Row("python", platform.python_version())]
    floors = _floors()
    for package, floor in floors.items():
        found = _version(package)
        ok = found is not None and (floor is None or floor.contains(found, prereleases=True))
        expected = "" if ok else f", expected {package}{floor or ''}"
        rows.append(Row(package, f"{found or 'not installed'}{expected}", ok))
    for package, use in _OPTIONAL.items():
        found = _version(package)
        rows.append(Row(package, found or f"not installed ({use})"))
    return rows


def device_rows() -> list[Row]:
    """Processor and memory, and every CUDA device."""
    import torch

    threads = torch.get_num_threads()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = counted(os.cpu_count() or 1, "core")
    cpu = f"{cores}, {counted(threads, 'thread')} used, {memory:.0f} GiB"
    rows = [Row("cpu", f"{platform.machine()}, {cpu}")]
    if not torch.cuda.is_available():
        built = torch.version.cuda
        what = "is the CPU build" if built is None else f"was built for CUDA {built}"
        return [*rows, Row("cuda", f"no device (this torch {what})")]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = (number / 2**30 for number in torch.cuda.mem_get_info(index))
        text = f"{facts.name}, compute capability {facts.major}.{facts.minor}"
        rows.append(Row(f"cuda:{index}", f"{text}, {free:.0f} of {total:.0f} GiB free"))
    return rows


def kernel_rows() -> list[Row]:
    """Prints registers, spills, shared memory and instructions of every kernel; what is wrong."""
    try:
        from fastdaa.kernels.aot import faults, measure, table
        from fastdaa.kernels.aot_entries import ENTRIES
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return [Row("triton", "not installed: pip install 'fastdaa[triton]'", ok=False)]
    from rich.console import Console
    from rich.progress import track

    pairs = [(entry, target) for entry in ENTRIES for target in entry.targets]
    shown = track(pairs, "compiling", console=Console(stderr=True), transient=True)
    try:
        measured = [(entry, measure(entry, target)) for entry, target in shown]
    except RuntimeError as error:
        return [Row("triton", str(error), ok=False)]
    print(table(numbers for _, numbers in measured))
    wrong = [
        Row(f"{numbers.name} on {numbers.target}", fault, ok=False)
        for entry, numbers in measured
        for fault in faults(entry, numbers)
    ]
    return wrong or [Row("compiled", f"{len(measured)}, none spills or exceeds shared memory")]


def empty_model(source: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration on the meta device: no weights are read or allocated.

    Of an adapter it is the base model's.

    Raises:
        OSError, ValueError: there is none, or it is not that of a causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastdaa.cli.paths import check_model
    from fastdaa.train.adapter_files import find_adapter

    check_model("model", source)
    try:
        adapter = find_adapter(source)
        source = source if adapter is None else adapter.base
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        said = str(error).split("Model type should be one of")[0]  # two hundred classes
        raise type(error)(
            f"model: expected a causal language model, got {source!r}: {said.rstrip()}"
        ) from error


def model_rows(model: PreTrainedModel) -> list[Row]:
    """Head, layout, attention and the ways through the head of a model, with the reasons."""
    import torch

    from fastdaa.train.support import supports_segments

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = f"{model.num_parameters() / 1e6:,.1f} M parameters"
    rows = [Row("model", f"{type(model).__name__}, {size}"), _base_row(model)]
    rows += _head_rows(model, device)
    support = supports_segments(model)
    layout = "prefix_shared" if support.ok else "padded"
    rows.append(Row("layout", f"{layout}: {support.reason}"))
    if support.ok:
        rows.append(Row("attention", _attention(model, device)))
    return rows


def _base_row(model: PreTrainedModel) -> Row:
    """What the weights take under LoRA, in GiB."""
    from torch import nn

    from fastdaa.train.quantization import describe

    config = getattr(model.config, "quantization_config", None)
    if config is not None:
        return Row("base under LoRA", f"is quantised: {describe(config)}")
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    coded = sum(layer.weight.numel() for layer in layers)
    rest = model.num_parameters() - coded
    # Scales: fp32 for each block of 64, or 8 bits and an fp32 for 256 of them; fp32 for each row.
    rows = sum(layer.out_features for layer in layers)
    sizes = {
        "bfloat16": 2.0 * coded,
        "8 bits": coded + 4.0 * rows,
        "4 bits": coded * (4 + 32 / 64) / 8,
        "4 bits, nested": coded * (4 + 8 / 64 + 32 / (64 * 256)) / 8,
    }
    texts = [f"{name} {(size + 2.0 * rest) / 2**30:,.2f}" for name, size in sizes.items()]
    return Row("base under LoRA", f"GiB: {'; '.join(texts)} (embeddings and head in bfloat16)")


def _adapter_rows(source: str) -> list[Row]:
    from fastdaa.train.adapter_files import find_adapter

    adapter = find_adapter(source)
    return [] if adapter is None else [Row("adapter", f"{adapter}, whose rows follow")]


def _head_rows(model: PreTrainedModel, device: str) -> list[Row]:
    import torch

    from fastdaa.head import LmHead
    from fastdaa.planner import plan_head

    try:
        head = LmHead.from_model(model)
    except ValueError as error:
        return [Row("head", str(error), ok=False)]
    vocab, hidden = head.weight.shape
    embedding: Any = model.get_input_embeddings()
    facts = [
        f"V = {vocab:,}, D = {hidden:,}",
        "tied to the embedding" if embedding.weight is head.weight else "not tied",
        "bias" if head.bias is not None else "no bias",
        f"softcap {head.softcap}" if head.softcap is not None else "no softcap",
        f"logit scale {head.logit_scale:g}",
    ]
    dtype = _training_dtype(device)
    full, lora = (
        plan_head(
            vocab, device, hidden_grad=True, head_grad=trained, loss_inside=True,
            hidden_size=hidden, operand=dtype, weight_dtype=torch.float32, hidden_dtype=dtype,
            softcap=head.softcap is not None, selected=True, gathered=True,
        )
        for trained in (True, False)
    )  # fmt: skip
    return [
        Row("head", ", ".join(facts)),
        Row("head path, full", full.explain()),
        Row("head path, LoRA", lora.explain()),
    ]


def _training_dtype(device: str) -> torch.dtype:
    """What `fastdaa train` computes in by default: bf16 autocast where the GPU has bf16."""
    import torch

    half = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if half else torch.float32


def _attention(model: PreTrainedModel, device: str) -> str:
    from fastdaa.train.segment_backends import choose_backend

    text: Any = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dtype = _training_dtype(device)
    choice = choose_backend(
        device,
        dtype,
        head_dim=head_dim,
        value_dim=getattr(text, "v_head_dim", None),
        softcap=getattr(text, "attn_logit_softcapping", None),
    )
    return f"{choice.name}, in {str(dtype).removeprefix('torch.')} on {device}: {choice.reason}"


def _floors() -> dict[str, Any]:
    """Required packages and their version ranges, from fastdaa's own metadata."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("fastdaa") or []
    except metadata.PackageNotFoundError:
        # A checkout that was never installed has no metadata.
        return dict.fromkeys(("torch", "transformers", "accelerate", "datasets"))
    needed = [Requirement(line) for line in lines]
    return {item.name: item.specifier for item in needed if item.marker is None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _print(title: str, rows: Sequence[Row]) -> bool:
    """Prints a section; whether all is well in it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Plain text: `[triton]` would be read as a style.
    table = Table(title=Text(title, style="table.title"), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(Text(row.name), Text(row.value), style=None if row.ok else "bold red")
    Console().print(table)
    return all(row.ok for row in rows)
