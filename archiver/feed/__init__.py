"""The change feed: committed changes, published in a fixed order for readers with a cursor."""

from archiver.feed.publisher import Publisher
from archiver.feed.publishing import CHANNEL, publish
from archiver.feed.reading import (
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
from archiver.feed.retention import delete_old

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
