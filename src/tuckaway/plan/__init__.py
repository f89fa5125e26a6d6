"""What becomes of every tensor, how many bytes it takes and where it goes: decided before anything is allocated."""

import sys
import types
from typing import Any

from tuckaway.plan.accounts import Accounts, DeviceMemory, account
from tuckaway.plan.balance import get_balanced_memory
from tuckaway.plan.device_map import (
    check_device_map,
    check_devices,
    clean_device_map,
    infer_auto_device_map,
    main_device_of,
    place_of,
)
from tuckaway.plan.machine import Speeds, cache_folder, known_speeds, remember_speeds
from tuckaway.plan.memory import format_bytes, get_max_memory, parse_bytes
from tuckaway.plan.planned import Plan
from tuckaway.plan.planner import plan
from tuckaway.plan.report import QuantizationReport, ReportRow, quantization_report
from tuckaway.plan.resolve import executing_device, resolve_device_map
from tuckaway.plan.select import choose_specs, output_head
from tuckaway.plan.sizes import compute_module_sizes, memory_footprint, tensor_sizes
from tuckaway.plan.ties import canonical_names, find_tied_parameters, retie_parameters, tied_groups

__all__ = [
    "Accounts",
    "DeviceMemory",
    "Plan",
    "QuantizationReport",
    "ReportRow",
    "Speeds",
    "account",
    "cache_folder",
    "canonical_names",
    "check_device_map",
    "check_devices",
    "choose_specs",
    "clean_device_map",
    "compute_module_sizes",
    "executing_device",
    "find_tied_parameters",
    "format_bytes",
    "get_balanced_memory",
    "get_max_memory",
    "infer_auto_device_map",
    "known_speeds",
    "main_device_of",
    "memory_footprint",
    "output_head",
    "parse_bytes",
    "place_of",
    "plan",
    "quantization_report",
    "remember_speeds",
    "resolve_device_map",
    "retie_parameters",
    "tensor_sizes",
    "tied_groups",
]


class _CallablePackage(types.ModuleType):
    """This package, where it is called: ``tuckaway.plan`` is the function, until a tool binds the package again."""

    def __call__(self, *args: Any, **kwargs: Any) -> Plan:
        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
