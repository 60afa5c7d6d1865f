"""Models that are loaded when somebody asks for them: a folder of checkpoints, the least recently used of which leave."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from fmray.errors import CheckpointError, RequestError
from fmray.serving.shelf import ServedModel

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a model's folder may be called: a client's name becomes a path only where it is one plain word."""


class Library:
    """A folder whose subfolders hold models. For one event loop: no lock."""

    def __init__(
        self,
        folder: str,
        most: int,
        open_model: Callable[[str, str], ServedModel],
        end: Callable[[ServedModel], None],
    ) -> None:
        """open_model: loads and warms the model of a name and a folder, in any thread. end: told which one has to leave."""
        self._folder, self._most, self._open_model, self._end = Path(folder), most, open_model, end
        self._loaded: OrderedDict[str, ServedModel] = OrderedDict()
        self._loading: dict[str, asyncio.Task[ServedModel]] = {}

    @property
    def names(self) -> list[str]:
        """Models that can be asked for."""
        if not self._folder.is_dir():
            return []
        return sorted(
            each.name for each in self._folder.iterdir() if each.is_dir() and NAME.fullmatch(each.name)
        )

    @property
    def loaded(self) -> list[ServedModel]:
        """Those in memory, the one asked for last at the end."""
        return list(self._loaded.values())

    async def model(self, name: str) -> ServedModel | None:
        """The model of that name, loaded where it is not; None where there is none. Many who ask at once load it once.

        Raises RequestError(500) where its folder holds no model that can be served.
        """
        if name in self._loaded:
            self._loaded.move_to_end(name)
            return self._loaded[name]
        if not NAME.fullmatch(name) or not (self._folder / name).is_dir():
            return None
        task = self._loading.get(name)
        if task is None:
            task = self._loading[name] = asyncio.get_running_loop().create_task(self._load(name))
            task.add_done_callback(lambda _: self._loading.pop(name, None))
        try:
            return await asyncio.shield(task)  # who leaves does not take it from the others
        except CheckpointError as error:
            logger.error("the model %s of the library cannot be served: %s", name, error)
            message = f"the model {name!r} cannot be served: its folder holds none that is whole"
            raise RequestError(500, "model_broken", message, "model") from None

    async def _load(self, name: str) -> ServedModel:
        loop = asyncio.get_running_loop()
        model = await loop.run_in_executor(None, self._open_model, name, str(self._folder / name))
        self._loaded[name] = model
        while len(self._loaded) > self._most:
            _, oldest = self._loaded.popitem(last=False)
            self._end(oldest)
        return model

    def close(self) -> None:
        """End every loaded model's threads."""
        for model in self._loaded.values():
            model.answers.close()
