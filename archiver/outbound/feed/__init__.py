"""Publish committed changes in a fixed order for readers with a cursor."""

from archiver.outbound.feed.publisher import Publisher
from archiver.outbound.feed.publishing import CHANNEL, delete_old, publish
from archiver.outbound.feed.reading import (
    ADVICE,
    Backlog,
    Entry,
    Extent,
    FeedEpoch,
    select_backlog,
    select_changes,
    select_epochs,
    select_extent,
)

__all__ = [
    "ADVICE",
    "CHANNEL",
    "Backlog",
    "Entry",
    "Extent",
    "FeedEpoch",
    "Publisher",
    "delete_old",
    "publish",
    "select_backlog",
    "select_changes",
    "select_epochs",
    "select_extent",
]
