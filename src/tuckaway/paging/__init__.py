"""Blocks that do not fit on the device: kept in host memory or on disk, brought in for their turn."""

from tuckaway.paging.arena import Arena
from tuckaway.paging.attach import attach
from tuckaway.paging.homes import PageHomes
from tuckaway.paging.hooks import PageHook
from tuckaway.paging.materialize import detach, is_paged, materialize, offloaded_tensor
from tuckaway.paging.page import PageLayout
from tuckaway.paging.state import Paging, paging_of
from tuckaway.paging.step import CapturedStep
from tuckaway.paging.store import Store
from tuckaway.paging.units import PagePlan, PageUnit, plan_pages

__all__ = [
    "Arena",
    "CapturedStep",
    "PageHomes",
    "PageHook",
    "PageLayout",
    "PagePlan",
    "PageUnit",
    "Paging",
    "Store",
    "attach",
    "detach",
    "is_paged",
    "materialize",
    "offloaded_tensor",
    "paging_of",
    "plan_pages",
]
