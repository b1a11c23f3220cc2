"""halfbyte as a quantisation method of transformers: `from_pretrained(…, quantization_config=HalfbyteConfig())`.

It owns what transformers asks of such a method, and that the model is, bit for bit, the one `load` makes; it must not
know how weights are quantised or multiplied, nor PEFT or trainers.

transformers loads; each weight of a linear layer is quantised as it comes and forgotten before the next.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte.errors import HalfbyteError, ModelError
from halfbyte.model import attention
from halfbyte.model.blocks import use_blocks
from halfbyte.model.loading import place_quantised, refuse_not_finite
from halfbyte.model.lora import adapted_modules
from halfbyte.model.matching import refuse_mostly_unquantised
from halfbyte.model.peft_layers import is_peft_layer
from halfbyte.model.saving import entries, stored_quantisation
from halfbyte.model.skeleton import Slot, slots
from halfbyte.quant.weight import QuantSpec

METHOD = "halfbyte"


@register_quantization_config(METHOD)
class HalfbyteConfig(QuantizationConfigMixin):
    """How transformers holds a model's linear layers in halfbyte's 4 bits.

    Args:
        quantization: The 4-bit format, `nf4` or `fp4`.
        scales: Each block's scale is its largest magnitude (`absmax`, as bitsandbytes), or the one with the least
            squared error (`mse`).

    Raises:
        KernelError: HB402 for another format or way.
    """

    def __init__(
        self, quantization: Literal["nf4", "fp4"] = "nf4", scales: Literal["absmax", "mse"] = "absmax"
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.quantization = quantization
        self.scales = scales
        self.stored: dict[str, Any] = {}
        self.spec  # noqa: B018, bad values are told here and not while a model is loaded

    @property
    def spec(self) -> QuantSpec:
        """How weights are quantised."""
        return QuantSpec(format=self.quantization, scales=self.scales)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A configuration from plain values, with or without the method's own name."""
        own = {key: value for key, value in config_dict.items() if key != "quant_method"}
        return super().from_dict(own, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]

    def to_dict(self) -> dict[str, Any]:
        """What a saved model's `config.json` says: the weights are written in bitsandbytes' form."""
        return dict(self.stored) or {
            "quant_method": METHOD,
            "quantization": self.quantization,
            "scales": self.scales,
        }


@register_quantizer(METHOD)
class HalfbyteQuantizer(HfQuantizer):
    """What transformers calls while it loads, trains and saves a model; see `HfQuantizer`."""

    requires_calibration = False
    quantization_config: HalfbyteConfig

    def __init__(self, quantization_config: HalfbyteConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._slots: dict[str, Slot] = {}
        self._left: set[str] = set()
        self._asked_attention: str | None = None
        self._fault: HalfbyteError | None = None

    def update_device_map(self, device_map: dict[str, Any] | str | None) -> None:
        """Everything goes to the CPU.

        Raises:
            ModelError: HB346 when parts were to go elsewhere.
        """
        if isinstance(device_map, dict) and {str(place) for place in device_map.values()} != {"cpu"}:
            raise ModelError(
                "HB346",
                f"device_map is {device_map}",
                fix='leave device_map out, or set it to "cpu"; on a GPU use BitsAndBytesConfig',
            )

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Note which attention was asked for; older versions of transformers do not tell."""
        self._asked_attention = config._attn_implementation
        return config

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether a tensor is the weight of a layer that will be in 4 bits."""
        return param_name in self._slots

    def get_quantize_ops(self) -> ConversionOps:
        """What is done to the weight of such a layer."""
        return _Quantise(self)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        wanted = slots(model)
        refuse_mostly_unquantised(str(model.name_or_path), wanted)
        self._slots = {slot.names[0]: slot for slot in wanted if slot.linear is not None}
        self._left = set(self._slots)
        # transformers rounds to the model's dtype what is not kept precise; `load` quantises what is stored.
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), *self._patterns}

    @property
    def _patterns(self) -> set[str]:
        return {f"^{re.escape(name)}$" for name in self._slots}

    def put(self, model: PreTrainedModel, name: str, tensor: Tensor) -> None:
        """Quantise a weight and put its layer in place; what is wrong with it is told when loading ends."""
        slot, where = self._slots[name], f"{model.name_or_path}"
        try:
            if tuple(tensor.shape) != slot.shape:
                what = f"{name} is {tuple(tensor.shape)}, config.json says {slot.shape}"
                raise ModelError("HB310", what, where=where, fix="fetch the folder again")
            refuse_not_finite(name, where, tensor)
            place_quantised(model, slot, tensor, self.quantization_config.spec)
            self._left.discard(name)
        except HalfbyteError as fault:
            self._fault = self._fault or fault

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        model._keep_in_fp32_modules_strict = set(model._keep_in_fp32_modules_strict or ()) - self._patterns
        if self._fault is not None:
            raise self._fault
        if self._left:
            raise ModelError(
                "HB308",
                f"{len(self._left)} weights of linear layers are in no file: {', '.join(sorted(self._left)[:5])}",
                where=str(model.name_or_path),
                fix="fetch config.json and the weights again from one revision",
            )
        self.quantization_config.stored = stored_quantisation(model)
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
        model.requires_grad_(False)
        if (
            self._asked_attention is None and model.config._attn_implementation == "sdpa"
        ):  # transformers' choice
            attention.use(model)
        use_blocks(model)

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What `save_pretrained` writes: the base in bitsandbytes' form; of an adapter, what transformers finds.

        Raises:
            ModelError: HB322 when the base is asked for and there are adapters in it.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        if adapted_modules(model) or any(is_peft_layer(module) for module in model.modules()):
            raise ModelError(
                "HB322",
                "the base is to be saved, and the model has an adapter",
                where=type(model).__name__,
                fix="save the PEFT model, which writes the adapter; save the base from a model without one",
            )
        return entries(model), {}

    def is_serializable(self) -> bool:
        """It is, in bitsandbytes' form."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train beside its layers."""
        return True


class _Quantise(ConversionOps):
    """Takes a weight away from transformers and gives it to the quantiser."""

    def __init__(self, quantizer: HalfbyteQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        model: Any = None,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, list[Tensor]]:
        """Take what was read for each name; nothing is left for transformers to put anywhere."""
        for name, given in input_dict.items():
            self._quantizer.put(model, name, given[0] if isinstance(given, list) else given)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}
