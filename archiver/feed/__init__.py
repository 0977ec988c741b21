"""The change feed: what was committed, published in an order that never changes, for whoever polls by cursor."""

from archiver.feed.publisher import Publisher
from archiver.feed.publishing import CHANNEL, publish
from archiver.feed.reading import (
    ADVICE,
    Entry,
    Extent,
    FeedEpoch,
    Waiting,
    select_changes,
    select_epochs,
    select_extent,
    select_waiting,
)
from archiver.feed.retention import delete_old

__all__ = [
    "ADVICE",
    "CHANNEL",
    "Entry",
    "Extent",
    "FeedEpoch",
    "Publisher",
    "Waiting",
    "delete_old",
    "publish",
    "select_changes",
    "select_epochs",
    "select_extent",
    "select_waiting",
]
