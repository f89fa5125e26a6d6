"""What becomes of every tensor, how many bytes it takes and where it goes: decided before anything is allocated."""

from tuckaway.plan.balance import get_balanced_memory
from tuckaway.plan.device_map import (
    check_device_map,
    check_devices,
    clean_device_map,
    infer_auto_device_map,
    main_device_of,
    place_of,
)
from tuckaway.plan.memory import format_bytes, get_max_memory, parse_bytes
from tuckaway.plan.report import QuantizationReport, ReportRow, quantization_report
from tuckaway.plan.resolve import resolve_device_map
from tuckaway.plan.select import choose_specs, output_head
from tuckaway.plan.sizes import compute_module_sizes, memory_footprint, tensor_sizes
from tuckaway.plan.ties import canonical_names, find_tied_parameters, retie_parameters, tied_groups

__all__ = [
    "QuantizationReport",
    "ReportRow",
    "canonical_names",
    "check_device_map",
    "check_devices",
    "choose_specs",
    "clean_device_map",
    "compute_module_sizes",
    "find_tied_parameters",
    "format_bytes",
    "get_balanced_memory",
    "get_max_memory",
    "infer_auto_device_map",
    "main_device_of",
    "memory_footprint",
    "output_head",
    "parse_bytes",
    "place_of",
    "quantization_report",
    "resolve_device_map",
    "retie_parameters",
    "tensor_sizes",
    "tied_groups",
]
