"""Three policies in one network, by switching adapters (peft): trained (theta), sampling (old) and reference.

theta and old each have a LoRA adapter on the UNet and a copy of the action encoder; the reference is the network with
adapters off and the action encoder as loaded.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from persistworld_cli.checkpoints.adapters import lora_config, write_adapter
from persistworld_cli.checkpoints.base_sample import sample_base
from persistworld_cli.config.settings import PostTrainSettings, Settings
from persistworld_cli.data.metadata.index import ActionStat
from persistworld_cli.models.cpu.hook import speed_up
from persistworld_cli.models.world_model import WorldModel

POLICIES = ("theta", "old", "reference")


def product_type_on_gpu(settings: Settings) -> torch.dtype | None:
    """The one type of all of a post-training's products on a GPU; None if sampling and learning differ, or float32."""
    both = settings.post_train.mixed_precision == "bf16" and settings.sampling.dtype == "bfloat16"
    return torch.bfloat16 if both else None


class PolicySwitch:
    """Adds adapters to a model and selects the policy of its calls.

    Args:
        model: the world model; its UNet gets LoRA layers in place, its weights are frozen.
        options: of LoRA, whether theta's action encoder learns, and the seed of the adapters' initial weights (B starts
            at 0, so theta = old = reference).
        held: hold the weights of the UNet's products in this type, if all calls are under autocast to it
            (`product_type_on_gpu`): the numbers are the same, and no call rounds them again.
    """

    def __init__(self, model: WorldModel, options: PostTrainSettings, held: torch.dtype | None = None) -> None:
        self.model = model
        model.requires_grad_(False)
        self.config = lora_config(options)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are intended
            torch.manual_seed(options.seed)
            for name in ("theta", "old"):
                inject_adapter_in_model(self.config, model.unet, adapter_name=name)
        speed_up(model.unet)
        self.layers: list[Any] = [m for m in model.unet.modules() if isinstance(m, BaseTunerLayer)]
        if held:
            self._hold(held)
        reference = model.action_encoder
        self.encoders = {"reference": reference, "theta": copy.deepcopy(reference), "old": copy.deepcopy(reference)}
        self.encoders["theta"].requires_grad_(options.train_action_encoder)
        for name, learns in (("theta", True), ("old", False)):
            for parameter in self._lora(name):
                parameter.requires_grad_(learns)
        self.copy_theta(0.0)
        self.activate("theta")

    def _hold(self, dtype: torch.dtype) -> None:
        """Round the UNet's frozen matrices and kernels; adapted ones are kept in float32 too, to merge adapters into.

        The first convolution stays: its type is the model's (`WorldModel.dtype`), which norms and inputs have.
        """
        for layer in self.layers:
            # no parameter: peft would save it with the adapter
            layer.register_buffer("exact", layer.base_layer.weight.detach(), persistent=False)
        for name, module in self.model.unet.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and "lora_" not in name and name != "conv_in":
                for part, value in list(module.named_parameters(recurse=False)):
                    setattr(module, part, nn.Parameter(value.to(dtype), requires_grad=False))

    def activate(self, policy: str, *, sampling: bool = False) -> None:
        """Use this policy in every later call of the model; see `use`."""
        for layer in self.layers:
            # as peft's enable_adapters and set_adapter, without the walk over parameters, whose flags never change
            layer._disable_adapters = policy == "reference"
            if policy != "reference":
                layer._active_adapter = [policy]
            layer.merging = sampling
        self.model.action_encoder = self.encoders[policy]

    @contextmanager
    def use(self, policy: str, *, sampling: bool = False) -> Iterator[None]:
        """`activate` for a block, then theta again.

        Args:
            policy: theta, old or reference.
            sampling: no gradient is needed and no predictions are compared, so layers may merge the adapter into their
                weight (a second copy of one layer at a time). The results are equal up to rounding (in bfloat16, to the
                rounding of the merged weights).
        """
        self.activate(policy, sampling=sampling)
        try:
            yield
        finally:
            self.activate("theta")

    def _lora(self, policy: str) -> list[nn.Parameter]:
        return [p for n, p in self.model.unet.named_parameters() if "lora_" in n and f".{policy}." in n]

    def parameters(self, policy: str = "theta") -> list[nn.Parameter]:
        """A policy's own parameters, in a fixed order: LoRA, then action encoder."""
        return self._lora(policy) + list(self.encoders[policy].parameters())

    def trainable(self) -> list[nn.Parameter]:
        """theta's parameters that learn."""
        return [p for p in self.parameters("theta") if p.requires_grad]

    @torch.no_grad()
    def copy_theta(self, decay: float) -> None:
        """old <- decay old + (1 - decay) theta (method.md section 4.5), without rounding where the two are equal.

        An error of 1e-7 in the action encoder's weights becomes 3e-3 in D under bfloat16, which hides equal policies.
        """
        for old, theta in zip(self.parameters("old"), self.parameters("theta"), strict=True):
            old.lerp_(theta.detach(), 1 - decay)

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Both policies' own weights, to resume from."""
        return {
            name: {
                **{f"unet.{k}": v for k, v in get_peft_model_state_dict(self.model.unet, adapter_name=name).items()},
                **{f"action_encoder.{k}": v for k, v in self.encoders[name].state_dict().items()},
            }
            for name in ("theta", "old")
        }

    def load_state(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Load what `state` returned."""
        for name, tensors in state.items():
            lora = {k.removeprefix("unet."): v for k, v in tensors.items() if k.startswith("unet.")}
            set_peft_model_state_dict(self.model.unet, lora, adapter_name=name)
            encoder = {k.removeprefix("action_encoder."): v for k, v in tensors.items() if k.startswith("action_enc")}
            self.encoders[name].load_state_dict(encoder)

    def save_adapter(self, folder: Path, policy: str = "old", stat: ActionStat | None = None) -> None:
        """Write a policy as a PEFT folder (`write_adapter`)."""
        lora = get_peft_model_state_dict(self.model.unet, adapter_name=policy)
        named = {f"base_model.model.{name}": tensor for name, tensor in lora.items()}
        encoder = self.encoders[policy].state_dict()
        base = sample_base(self.model.unet)
        write_adapter(folder, self.config, named, encoder, force=True, stat=stat, base=base)
