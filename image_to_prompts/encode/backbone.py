"""Features of a pretrained backbone, or the predictions of a model that stands on one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import nn

from ..data.rows import Fit
from ..models import backbones, checkpoints, doubt, freezing
from ..run.devices import autocast, mixed_precision, process_state, type_of

_loaded: WeakValueDictionary[str, BackboneEncoder] = WeakValueDictionary()


class BackboneEncoder:
    """A network that looks at one square of each image, in the hardware's half precision."""

    def __init__(self, model: nn.Module, spec: backbones.Spec, stages: Sequence[nn.Module] = ()) -> None:
        """Takes a model from `checkpoints.build`; its matrices are kept in half precision from here on.

        Args:
            model: The model.
            spec: Its description.
            stages: Modules of it whose statistics (`doubt.looking`) come behind what the model gives.
        """
        self.device = process_state().device
        self.model = model.requires_grad_(False).to(self.device).eval()
        freezing.half_frozen(self.model, type_of(mixed_precision(self.device)))
        self.stages = stages
        self.fits: tuple[Fit, ...] = (Fit(spec.image_size, spec.crop),)
        self.about: dict[str, Any] = {"backbone": spec.to_dict()}
        self._last: tuple[torch.Tensor | None, np.ndarray] = (None, np.empty(0))

    @classmethod
    def pretrained(cls, spec: backbones.Spec) -> BackboneEncoder:
        """The features of a backbone's pretrained weights; raises as `backbones.load_pretrained`.

        While one is in use, it is given again: an encoder may stand on another one's features.
        """
        key = json.dumps(spec.to_dict(), sort_keys=True)
        found = _loaded.get(key)
        if found is None:
            model = checkpoints.pretrained(spec)
            model.head = nn.Identity()
            found = _loaded[key] = cls(model, spec)
        return found

    def see(self, squares: list[torch.Tensor]) -> np.ndarray:
        """Maps uint8 (n, 3, size, size) to float32 (n, d)."""
        if self._last[0] is not squares[0]:
            with autocast(self.device), doubt.looking(self.stages) as statistics:
                given = self.model(squares[0].to(self.device)).float()
                self._last = squares[0], torch.cat([given, *statistics], 1).cpu().numpy()
        return self._last[1]
