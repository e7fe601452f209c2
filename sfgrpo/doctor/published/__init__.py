"""Configurations of the published models that recipes name: all of a model but its weights.

One JSON file a model, with the public sources of its values; it may name a model whose parts it
shares (`like`) but for those of its own. Networks are built from them on
PyTorch's meta device, so that what a model needs can be said without a network connection and
without memory. Training never reads these files: it loads what the model's publisher serves.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

SLASH = "--"
"""Stands for the slash of an id in a file's name."""
BUILT = (
    "scheduler", "text_encoder", "connectors", "image_encoder", "transformer", "vae", "audio_vae",
    "vocoder",
)  # fmt: skip
"""How the names of the parts begin that are built; tokenizers and image processors are not."""


DRAWS = (
    nn.init.kaiming_uniform_, nn.init.normal_, nn.init.trunc_normal_, nn.init.uniform_,
    nn.init.xavier_uniform_, Tensor.normal_, Tensor.uniform_,
)  # fmt: skip
"""What fills a tensor, its first argument, at random."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One part of a pipeline."""

    library: str
    """"diffusers" or "transformers", or the name of a folder of diffusers' pipelines."""
    kind: str
    """Name of the class in that library."""
    config: Mapping[str, Any]
    """What the part's configuration file says, without entries that change nothing here."""

    @property
    def made(self) -> Any:
        """The class."""
        known = self.library in ("diffusers", "transformers")
        module = self.library if known else f"diffusers.pipelines.{self.library}"
        return getattr(importlib.import_module(module), self.kind)

    def build(self) -> Any:
        """An instance as the configuration describes it, on the current default device."""
        made, config = self.made, json.loads(json.dumps(self.config))  # both libraries change it
        if self.library == "transformers":
            return made(made.config_class.from_dict(config))
        return made.from_config(config)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model."""

    id: str
    """Its id on the Hub, in the layout of diffusers."""
    pipeline: str
    """Name of its pipeline class in diffusers."""
    pipeline_config: Mapping[str, Any]
    """Arguments of the pipeline beside the components."""
    components: Mapping[str, Component]
    """By the pipeline's names; no tokenizers."""
    sources: tuple[str, ...]
    """Where the values come from, and what could not be confirmed."""

    def networks(self, dtype: torch.dtype) -> dict[str, nn.Module]:
        """Every network on the meta device, as `from_pretrained(dtype=dtype)` would return it."""
        with torch.device("meta"), Unfilled():
            return {
                name: _as_loaded(component.build(), dtype)
                for name, component in self.components.items()
                if issubclass(component.made, nn.Module)
            }

    def build(self, dtype: torch.dtype) -> DiffusionPipeline:
        """The pipeline around `networks(dtype)`, with its scheduler and without tokenizers."""
        parts: dict[str, Any] = {**self.networks(dtype), **self.pipeline_config}
        for name, component in self.components.items():
            if name not in parts:
                parts[name] = component.build()
        made = getattr(importlib.import_module("diffusers"), self.pipeline)
        arguments = list(inspect.signature(made.__init__).parameters.values())[1:]
        # Tokenizers, and parts that a pipeline can do without (the T5 of Stable Diffusion 3).
        absent = [a.name for a in arguments if a.default is a.empty and a.name not in parts]
        pipeline = made(**parts, **{n: Unread() if n == "processor" else None for n in absent})
        pipeline.register_modules(**dict.fromkeys(absent))
        return pipeline


class Unread:
    """Stands in for a processor, of which Qwen-Image 2.1's pipeline asks for tokens while it is
    made."""

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        """The tokens of any messages: none."""
        return [[]]

    def encode(self, text: str) -> list[int]:
        """The token of any word."""
        return [0]


class Unfilled(TorchFunctionMode):
    """Within it no tensor is filled at random: those of the meta device have no values, and to draw
    none takes as long as to build the rest of a network."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def names() -> list[str]:
    """Ids of the models known here."""
    found = (file.name for file in files(__name__).iterdir())
    return sorted(
        name.removesuffix(".json").replace(SLASH, "/") for name in found if name.endswith(".json")
    )


def find(model_id: str) -> Published | None:
    """The model of that id, if it is known here."""
    if model_id not in names():
        return None
    path = files(__name__) / f"{model_id.replace('/', SLASH)}.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    like = find(tree.pop("like", ""))
    components = {
        name: Component(library=library, kind=kind, config=config)
        for name, (library, kind, config) in tree.pop("components").items()
    }
    sources = *tree.pop("sources"), *(like.sources if like else ())
    return Published(
        components={**(like.components if like else {}), **components}, sources=sources, **tree
    )


def describe(path: str | Path) -> Published:
    """A pipeline as its own configuration files describe it: those of a folder, or of an id on the
    Hub.

    Raises:
        OSError: says where the files were looked for.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    index: Any = DiffusionPipeline.load_config(path)
    components, options = {}, {}
    for name, entry in index.items():
        if isinstance(entry, (list, tuple)):
            if name.startswith(BUILT) and None not in entry:
                library, kind = entry
                components[name] = _component(library, kind, path, name)
        elif not name.startswith("_"):
            options[name] = entry
    return Published(
        id=str(path), pipeline=index["_class_name"], pipeline_config=options,
        components=components, sources=(str(path),),
    )  # fmt: skip


def _component(library: str, kind: str, path: str | Path, name: str) -> Component:
    made = Component(library=library, kind=kind, config={}).made
    if library == "transformers":
        config, _ = made.config_class.get_config_dict(path, subfolder=name)
    else:
        config = made.load_config(path, subfolder=name)
    return Component(library=library, kind=kind, config=config)


def _as_loaded(network: Any, dtype: torch.dtype) -> nn.Module:
    """In the dtypes that loading gives: some parameters stay fp32, and so do computed buffers.

    Tensors that a class keeps as plain attributes (Qwen-Image's rotary table) become buffers, where
    code that moves or replaces a module's tensors finds them.
    """
    kept = set(getattr(network, "_keep_in_fp32_modules_strict", None) or ())
    # transformers upcasts its plain list in fp16 alone.
    if dtype == torch.float16 or not hasattr(network, "_keep_in_fp32_modules_strict"):
        kept |= set(network._keep_in_fp32_modules or ())
    for module in network.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                delattr(module, name)
                module.register_buffer(name, value, persistent=False)
    for name, tensor in _stored(network):
        if tensor.is_floating_point():
            tensor.data = tensor.to(torch.float32 if kept & set(name.split(".")) else dtype)
    return network.eval()


def _stored(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and those buffers that checkpoints hold."""
    stored = network.state_dict(keep_vars=True)
    yield from {id(tensor): (name, tensor) for name, tensor in stored.items()}.values()
