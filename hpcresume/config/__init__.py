"""Settings: typed, from layers of TOML, environment and flags, each value with its origin."""

from hpcresume.config.load import Explained, Resolved, load_settings, site_settings
from hpcresume.config.resources import data_dir
from hpcresume.config.settings import (
    MergeSettings,
    Request,
    RunSettings,
    Settings,
    SiteSettings,
    SyncSettings,
    TaskSettings,
)
from hpcresume.config.sites import Site, find_site, identify_site, site_names

__all__ = [
    "Explained",
    "MergeSettings",
    "Request",
    "Resolved",
    "RunSettings",
    "Settings",
    "Site",
    "SiteSettings",
    "SyncSettings",
    "TaskSettings",
    "data_dir",
    "find_site",
    "identify_site",
    "load_settings",
    "site_names",
    "site_settings",
]
