"""A guard for tests: what a file from somebody else must never bring about is noticed, even where it is caught."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

OWN = tuple(str(Path(p).resolve()) for p in {sys.prefix, sys.base_prefix, Path(__file__).parents[1]})
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
_watching: list[list[str]] = []


def _own(file: str) -> bool:
    """Whether code is of Python, of an installed package or of this project, or was made by one of them."""
    return file.startswith("<") or str(Path(file).resolve()).startswith(OWN)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    what = None
    if event == "exec" and isinstance(arguments[0], CodeType) and not _own(arguments[0].co_filename):
        what = f"code of {arguments[0].co_filename}"
    elif event == "socket.connect" and isinstance(arguments[1], tuple):  # a text is a socket in the file system
        what = f"a connection to {arguments[1]}"
    elif event == "socket.getaddrinfo":
        what = f"the address of {arguments[0]}"
    elif event == "pickle.find_class":
        what = f"pickle: {arguments[0]}.{arguments[1]}"
    elif event in STARTS:
        what = f"{event}: {arguments[:2]}"
    if what is not None:
        _watching[-1].append(what)
        raise PermissionError(f"not in this test: {what}")


sys.addaudithook(_hook)  # never removed: it does nothing unless something is watched


@contextmanager
def watched() -> Iterator[list[str]]:
    """Refuse and list, inside the block: foreign code, new processes, the network, pickles, transformers' loaders."""
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:
            _watch_torch(patch, found)
        if "transformers" in sys.modules:
            _watch_transformers(patch, found)
        _watching.append(found)
        try:
            yield found
        finally:
            _watching.remove(found)


@contextmanager
def unwatched() -> Iterator[None]:
    """For what a test itself starts."""
    before = _watching[:]
    _watching.clear()
    try:
        yield
    finally:
        _watching.extend(before)


def _watch_torch(patch: pytest.MonkeyPatch, found: list[str]) -> None:
    import torch

    real = torch.load

    def load(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("weights_only") is False:
            found.append(f"torch.load without weights_only: {args[:1]}")
            raise PermissionError(found[-1])
        return real(*args, **kwargs)

    patch.setattr(torch, "load", load)


def _watch_transformers(patch: pytest.MonkeyPatch, found: list[str]) -> None:
    """Any of its loaders: with trust_remote_code they run code, without they ask a hub for a name that a file gave."""
    import transformers as t
    from transformers.processing_utils import ProcessorMixin

    autos = (t.AutoConfig, t.AutoImageProcessor, t.AutoModel, t.AutoProcessor, t.AutoTokenizer)
    for cls in (*autos, t.PreTrainedModel, t.PreTrainedTokenizerBase, t.PretrainedConfig, ProcessorMixin):

        def load(own: type, *args: Any, **kwargs: Any) -> Any:
            found.append(f"{own.__name__}.from_pretrained: {args[:1]}, {kwargs}")
            raise PermissionError(found[-1])

        patch.setattr(cls, "from_pretrained", classmethod(load))
