"""Plain English in the comments of tables, views and columns."""

from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

# Each object, its comment before, its comment now.
COMMENTS: dict[str, tuple[str, str]] = {
    "TABLE archiver.acts": (
        "The audit trail of administrative acts; append-only and sealed.",
        "The audit log of administrative actions; append-only and sealed.",
    ),
    "COLUMN archiver.acts.actor": (
        "Who did it: a user of the operating system, or a part of ours.",
        "User of the operating system, or the archiver itself.",
    ),
    "COLUMN archiver.acts.kind": (
        "What was done, such as erase or hold.add.",
        "Action, such as erase or hold.add.",
    ),
    "COLUMN archiver.acts.reason": (
        "Why, as the actor said.",
        "Reason, as given by the actor.",
    ),
    "COLUMN archiver.acts.detail": (
        "To what, and with which result; no content.",
        "Targets and result of the action; no content.",
    ),
    "TABLE archiver.attempts": (
        "Each attempt at a delivery, and what came of it.",
        "Attempts at deliveries, with their results.",
    ),
    "COLUMN archiver.attempts.number": (
        "1, 2, 3 … of its delivery.",
        "Number of the attempt: 1, 2, 3 …",
    ),
    "COLUMN archiver.attempts.fault": (
        "What was wrong; null where it was delivered.",
        "Fault code; null if delivered.",
    ),
    "COLUMN archiver.attempts.answer": (
        "First 256 bytes of the answer; null once what it is about is erased.",
        "First 256 bytes of the response; null once its subject is erased.",
    ),
    "TABLE archiver.backfills": (
        "Backfills that have begun and not ended, so that they can go on.",
        "Unfinished backfills, so that they can resume.",
    ),
    "COLUMN archiver.backfills.selection": (
        "Digest of what was asked for.",
        "Digest of the selection.",
    ),
    "COLUMN archiver.backfills.started_at": (
        "Sessions read since then need not be read again.",
        "Start; sessions read since then are not read again.",
    ),
    "TABLE archiver.chats": (
        "One row a turn: its newest revision, derived from the ledger.",
        "One row per turn: its newest revision, derived from the ledger.",
    ),
    "COLUMN archiver.chats.session_id": (
        "Conversation; empty where no delivery told it.",
        "Session; empty for an unassigned turn.",
    ),
    "COLUMN archiver.chats.chat_id": (
        "CallHQ's chat id: one turn; U+001F and a number: only history knows.",
        "CallHQ's chat id; U+001F and a number: known only from history.",
    ),
    "COLUMN archiver.chats.cost": (
        "What the turn cost, as told upstream.",
        "Cost of the turn, as reported upstream.",
    ),
    "COLUMN archiver.chats.created_at": (
        "Upstream creation time; null if not told.",
        "Upstream creation time; null if not reported.",
    ),
    "COLUMN archiver.chats.updated_at": (
        "Upstream time of the newest revision; null if not told.",
        "Upstream time of the newest revision; null if not reported.",
    ),
    "COLUMN archiver.chats.occurred_at": (
        "Earliest time that any of its deliveries told; orders turns of one instant.",
        "Earliest envelope time of its deliveries; orders turns with equal creation times.",
    ),
    "COLUMN archiver.chats.first_received_at": (
        "When we first heard of it.",
        "Arrival of its first delivery.",
    ),
    "COLUMN archiver.chats.session_name": (
        "Name of the session, where its deliveries told it.",
        "Name of the session, from its deliveries.",
    ),
    "COLUMN archiver.chats.session_status": (
        "Status of the session, where its deliveries told it.",
        "Status of the session, from its deliveries.",
    ),
    "COLUMN archiver.chats.source": (
        "Whence it is known: webhook or history.",
        "Source: webhook or history.",
    ),
    "TABLE archiver.deliveries": (
        "Follow-ups at hand, ids only: content is read as it is sent, and the queue is the feed.",
        "Deliveries of follow-ups, ids only: content is read when it is sent.",
    ),
    "COLUMN archiver.deliveries.subscription_id": (
        "To whom.",
        "Subscription.",
    ),
    "COLUMN archiver.deliveries.created_at": (
        "When it was found to be for this subscription.",
        "When the delivery was created.",
    ),
    "COLUMN archiver.deliveries.state": (
        "pending, delivered or dead: given up.",
        "pending, delivered or dead (no further attempts).",
    ),
    "COLUMN archiver.deliveries.last_attempt": (
        "Number of the attempt after which it is given up.",
        "Number of the last attempt before it is dead.",
    ),
    "COLUMN archiver.deliveries.due_at": (
        "It is not tried before.",
        "Next attempt not before this time.",
    ),
    "COLUMN archiver.deliveries.ended_at": (
        "When it was delivered or given up.",
        "When it was delivered or became dead.",
    ),
    "TABLE archiver.duties": (
        "When duties that workers share were last begun.",
        "When a worker last started each shared duty.",
    ),
    "COLUMN archiver.duties.name": (
        "A duty that one worker at a time does.",
        "Duty that one worker at a time runs.",
    ),
    "TABLE archiver.epoch_faults": (
        "Epochs in which the database went back: it is not served until archiver adopt begins another.",
        "Epochs in which the database lost rows: it is not served until archiver adopt starts a new epoch.",
    ),
    "COLUMN archiver.epoch_faults.reason": (
        "What the database lacks of what that machine saw committed.",
        "Rows that the machine saw committed and that the database lacks.",
    ),
    "TABLE archiver.epochs": (
        "Which database this is: begun by the first process that served it, and by archiver adopt.",
        "Identity of this database; a row is added by the first process that serves it and by archiver adopt.",
    ),
    "COLUMN archiver.epochs.id": (
        "1, 2, 3 …; the last counts.",
        "1, 2, 3 …; the greatest is current.",
    ),
    "COLUMN archiver.epochs.system_identifier": (
        "Of the cluster; empty where the user may not ask.",
        "System identifier of the cluster; empty if the user may not read it.",
    ),
    "COLUMN archiver.epochs.timeline": (
        "At its beginning.",
        "Timeline when the epoch began.",
    ),
    "COLUMN archiver.epochs.place": (
        "Which files an embedded database has; null of any other.",
        "Identifier of the data files of an embedded database; null otherwise.",
    ),
    "COLUMN archiver.epochs.cursor": (
        "Newest change at its beginning.",
        "Newest change when the epoch began.",
    ),
    "COLUMN archiver.epochs.given": (
        "Greatest cursor known to be given before it, lost ones included; null in rows of older versions.",
        "Greatest cursor known to be assigned before, lost ones included; null in rows of older versions.",
    ),
    "TABLE archiver.erasures": (
        "What was erased and does not come back: no content, and none is taken for it; append-only.",
        "Erased sessions and turns, without content; later deliveries for them are refused; append-only.",
    ),
    "COLUMN archiver.erasures.session_id": (
        "Session; empty for facts that do not tell theirs.",
        "Session; empty for unassigned facts.",
    ),
    "COLUMN archiver.erasures.chat_id": (
        "Turn; empty: the whole session.",
        "Turn (chat id); empty for the whole session.",
    ),
    "COLUMN archiver.erasures.erased_at": (
        "When it was ordered; the content goes right after.",
        "When it was ordered; the content is deleted right after.",
    ),
    "COLUMN archiver.erasures.act_id": (
        "The act that tells who and why.",
        "Audit log entry with actor and reason.",
    ),
    "TABLE archiver.events": (
        "The ledger: each distinct fact once, byte for byte. Everything else is derived from it.",
        "The ledger: each distinct fact once, byte for byte. All other archive tables are derived from it.",
    ),
    "COLUMN archiver.events.session_id": (
        "Session it belongs to; empty where the delivery does not tell.",
        "Session; empty if the delivery names none.",
    ),
    "COLUMN archiver.events.type": (
        "Event type as told, such as chat.created; or ours, by source.",
        "Event type as received, such as chat.created; for other sources a type of the archiver.",
    ),
    "COLUMN archiver.events.source": (
        "Whence it came: webhook, history or application.",
        "Source: webhook, history or application.",
    ),
    "COLUMN archiver.events.chat_id": (
        "Turn it speaks of; null for events without one.",
        "Turn (chat id); null for events without one.",
    ),
    "COLUMN archiver.events.received_at": (
        "When its first delivery reached us.",
        "Time of arrival of the first delivery.",
    ),
    "COLUMN archiver.events.last_received_at": (
        "When its latest delivery reached us.",
        "Time of arrival of the latest delivery.",
    ),
    "COLUMN archiver.events.delivery_count": (
        "Deliveries of this same fact, the first included.",
        "Number of deliveries of this fact, including the first.",
    ),
    "COLUMN archiver.events.occurred_at": (
        "Time that its first delivery told in the envelope.",
        "Envelope time of the first delivery.",
    ),
    "COLUMN archiver.events.key_id": (
        "Which webhook secret matched its first delivery; none where unsigned.",
        "Key id of the webhook secret that verified the first delivery; none if unsigned.",
    ),
    "COLUMN archiver.events.earliest_at": (
        "Earlier time that a later delivery told; null if none did.",
        "Earlier envelope time of a later delivery; null if none.",
    ),
    "COLUMN archiver.events.is_recounted": (
        "It was delivered again since its counters were last sealed.",
        "Whether it was redelivered after its counters were last sealed.",
    ),
    "TABLE archiver.holds": (
        "Legal holds: what one in force covers is neither erased nor expired.",
        "Legal holds: a hold in force blocks erasure and expiry of what it covers.",
    ),
    "TABLE archiver.messages": (
        "One row a message, derived from the ledger.",
        "One row per message, derived from the ledger.",
    ),
    "COLUMN archiver.messages.source": (
        "Whence it is known: webhook or history.",
        "Source: webhook or history.",
    ),
    "COLUMN archiver.messages.place": (
        "1, 2, 3 … in true order, once history has been read; null before.",
        "Position in the transcript: 1, 2, 3 …; null until history was read.",
    ),
    "COLUMN archiver.messages.in_history": (
        "Whether the latest reading shows it; null where none could.",
        "Whether the latest reading shows it; null if no reading could show it.",
    ),
    "COLUMN archiver.messages.content_kind": (
        "What content is: text, refusal, tool_call or other; the last two are no text.",
        "Kind of content: text, refusal, tool_call or other; the last two are not text.",
    ),
    "TABLE archiver.outbox": (
        "Changes as they were committed, one row a transaction, until a worker publishes them.",
        "Changes of each committed transaction, until a worker publishes them.",
    ),
    "COLUMN archiver.outbox.id": (
        "Grows with writing, not with committing: nothing may be read by it.",
        "Assigned when written, not when committed: not usable as a cursor.",
    ),
    "TABLE archiver.pauses": (
        "A pause that every worker obeys.",
        "A pause that all workers observe.",
    ),
    "COLUMN archiver.pauses.until": (
        "Nobody calls before.",
        "End of the pause: no calls before this time.",
    ),
    "COLUMN archiver.pauses.reason": (
        "What was answered.",
        "Response that requested the pause.",
    ),
    "COLUMN archiver.quarantine.received_at": (
        "When its first delivery reached us.",
        "Arrival of the first delivery.",
    ),
    "COLUMN archiver.quarantine.last_received_at": (
        "When its latest delivery reached us.",
        "Arrival of the latest delivery.",
    ),
    "COLUMN archiver.quarantine.delivery_count": (
        "Deliveries of these same bytes.",
        "Number of deliveries of these bytes.",
    ),
    "COLUMN archiver.quarantine.reason": (
        "Stable code of why it was not archived.",
        "Stable code of the reason.",
    ),
    "COLUMN archiver.quarantine.key_id": (
        "Which webhook secret matched.",
        "Key id of the webhook secret that verified it.",
    ),
    "COLUMN archiver.quarantine.body_digest": (
        "SHA-256 of what it is told apart by: the bytes, and of a fact of ours whose it is.",
        "SHA-256 that identifies it: over the bytes, or over session and dedupe key of an internal fact.",
    ),
    "COLUMN archiver.quarantine.source": (
        "Whence it came: webhook, history or application.",
        "Source: webhook, history or application.",
    ),
    "COLUMN archiver.quarantine.type": (
        "Kind of a fact of ours, such as history.read; null for a webhook.",
        "Type of an internal fact, such as history.read; null for a webhook.",
    ),
    "COLUMN archiver.quarantine.session_id": (
        "Session of a fact of ours; null for a webhook.",
        "Session of an internal fact; null for a webhook.",
    ),
    "COLUMN archiver.quarantine.dedupe_key": (
        "Key in the ledger of a fact of ours; null for a webhook.",
        "Dedupe key of an internal fact; null for a webhook.",
    ),
    "TABLE archiver.recounts": (
        "What the counters of an event stood at when they were sealed; append-only.",
        "Counters of an event when they were sealed; append-only.",
    ),
    "TABLE archiver.removals": (
        "Ledger rows that retention removed, metadata and all; append-only.",
        "Ledger rows that retention deleted, metadata included; append-only.",
    ),
    "COLUMN archiver.removals.act_id": (
        "The act that tells by which rule.",
        "Audit log entry of the retention run.",
    ),
    "TABLE archiver.seals": (
        "The chain of seals: each proves what the ledger held, and that nothing before it was changed.",
        "The chain of seals: each proves the content of the ledger and of the previous seal.",
    ),
    "COLUMN archiver.seals.events_through": (
        "Events up to this id are sealed, here or before.",
        "Events up to this id are sealed, by this or an earlier seal.",
    ),
    "COLUMN archiver.seals.recounts_through": (
        "Likewise of recounts.",
        "The same for recounts.",
    ),
    "COLUMN archiver.seals.acts_through": (
        "Likewise of acts.",
        "The same for acts.",
    ),
    "COLUMN archiver.seals.erasures_through": (
        "Likewise of erasures.",
        "The same for erasures.",
    ),
    "COLUMN archiver.seals.removals_through": (
        "Likewise of removals.",
        "The same for removals.",
    ),
    "COLUMN archiver.seals.previous": (
        "Hash of the seal before; zeros at the first.",
        "Hash of the previous seal; zeros for the first.",
    ),
    "TABLE archiver.sessions": (
        "One row a conversation, derived from the ledger.",
        "One row per conversation, derived from the ledger.",
    ),
    "COLUMN archiver.sessions.session_id": (
        "CallHQ's session id; empty: turns whose session is not known.",
        "CallHQ's session id; empty for unassigned turns.",
    ),
    "COLUMN archiver.sessions.first_event_at": (
        "When we first heard of it.",
        "Arrival of the first event of the session.",
    ),
    "COLUMN archiver.sessions.last_event_at": (
        "When we last heard something new of it.",
        "Arrival of the latest new fact of the session.",
    ),
    "COLUMN archiver.sessions.coverage": (
        "What is known of its completeness.",
        "State of completeness, as in analytics.coverage.",
    ),
    "COLUMN archiver.sessions.reason": (
        "Code of why it is so.",
        "Code of the reason for that state.",
    ),
    "COLUMN archiver.sessions.reconciled_at": (
        "Start of the latest reading that told its messages; null if none did.",
        "Start of the latest reading that returned messages; null if none.",
    ),
    "COLUMN archiver.sessions.read_at": (
        "Start of the latest reading, whatever it told; null if there was none.",
        "Start of the latest reading with any result; null if none.",
    ),
    "COLUMN archiver.sessions.repaired_messages": (
        "Messages that history supplied.",
        "Number of messages recovered from history.",
    ),
    "COLUMN archiver.sessions.name": (
        "Name, as history or the application told it.",
        "Name, from history or the application.",
    ),
    "COLUMN archiver.sessions.status": (
        "Upstream status, as history told it.",
        "Upstream status, from history.",
    ),
    "COLUMN archiver.sessions.assistant_id": (
        "Assistant, as history or the application told it.",
        "Assistant, from history or the application.",
    ),
    "COLUMN archiver.sessions.created_at": (
        "Upstream creation, as history or the application told it.",
        "Upstream creation time, from history or the application.",
    ),
    "COLUMN archiver.sessions.read_by": (
        "A last reading is due by then, before upstream forgets the session.",
        "Deadline of the last reading, before the session expires upstream.",
    ),
    "COLUMN archiver.sessions.reconcile_at": (
        "When its history is to be read next; null: never again.",
        "When its history is due; null: not again.",
    ),
    "COLUMN archiver.sessions.leased_until": (
        "A worker reads it at present; free again after this time.",
        "End of the lease of the worker that reads it.",
    ),
    "COLUMN archiver.sessions.failing_since": (
        "Since then every reading has failed; null if the latest did not.",
        "Start of the current series of failed readings; null if the latest succeeded.",
    ),
    "COLUMN archiver.sessions.places": (
        "Messages of its transcript, if its history was read; else null.",
        "Number of messages in its transcript; null if its history was never read.",
    ),
    "COLUMN archiver.sessions.append_after": (
        "A new turn that begins after this is appended to the transcript; null: all is aligned again.",
        "A new turn that begins after this time is appended; null: the whole session is aligned again.",
    ),
    "TABLE archiver.subscriptions": (
        "Who is told of changes, and up to where they were.",
        "Receivers of changes, and the cursor up to which each has read the feed.",
    ),
    "COLUMN archiver.subscriptions.events": (
        "Types of changes that are told.",
        "Change types that are delivered.",
    ),
    "COLUMN archiver.subscriptions.assistant_id": (
        "Only of conversations of this assistant; null: of any.",
        "Only conversations of this assistant; null: all.",
    ),
    "COLUMN archiver.subscriptions.variable": (
        "Only where this variable has this value; null: anywhere.",
        "Only conversations in which this variable has this value; null: all.",
    ),
    "COLUMN archiver.subscriptions.contains": (
        "Only where a message holds this text, in whatever case; null: anywhere.",
        "Only conversations with a message that contains this text, ignoring case; null: all.",
    ),
    "COLUMN archiver.subscriptions.is_ordered": (
        "Whether each session is told in the order of the feed.",
        "Whether changes of each session are delivered in the order of the feed.",
    ),
    "COLUMN archiver.subscriptions.concurrency": (
        "Deliveries that may be under way at a time.",
        "Maximum concurrent deliveries.",
    ),
    "COLUMN archiver.subscriptions.previous_secret": (
        "The one before, which signs as well for a while.",
        "Previous secret, which also signs for a while.",
    ),
    "COLUMN archiver.subscriptions.previous_until": (
        "Until then.",
        "When the previous secret ends.",
    ),
    "COLUMN archiver.subscriptions.cursor": (
        "Up to here the feed was looked at.",
        "The feed is processed up to this cursor.",
    ),
    "COLUMN archiver.subscriptions.paused_at": (
        "When it was paused; null: it is at work.",
        "When it was paused; null: active.",
    ),
    "COLUMN archiver.subscriptions.pause_reason": (
        "Why: paused by hand, gone (the receiver said 410), or failing for long.",
        "Reason: paused by hand, gone (the receiver returned 410) or failing.",
    ),
    "COLUMN archiver.subscriptions.failures": (
        "Attempts that failed in a row.",
        "Consecutive failed attempts.",
    ),
    "COLUMN archiver.subscriptions.failing_since": (
        "When the first of them did; null where the latest did not.",
        "Start of the current series of failures; null if the latest attempt succeeded.",
    ),
    "COLUMN archiver.subscriptions.closed_until": (
        "Its receiver is left alone until then.",
        "End of the time for which the circuit breaker blocks deliveries.",
    ),
    "COLUMN archiver.subscriptions.leased_by": (
        "Which worker sends for it at present.",
        "Worker that holds the lease.",
    ),
    "COLUMN archiver.subscriptions.leased_until": (
        "Another may after this time.",
        "End of the lease.",
    ),
    "TABLE archiver.workers": (
        "What each worker last reported about its duties; rows that are a day old are deleted.",
        "Latest report of each worker; rows older than a day are deleted.",
    ),
    "VIEW analytics.changes": (
        "One row a change of the archive: a feed to poll by cursor.",
        "One row per change of the archive: a feed to poll by cursor.",
    ),
    "COLUMN analytics.changes.cursor": (
        (
            "1, 2, 3 … in each epoch without gaps, visible in this order: read WHERE cursor > the last "
            "that you have seen."
        ),
        "1, 2, 3 … in each epoch without gaps, visible in this order: read WHERE cursor > the last one seen.",
    ),
    "COLUMN analytics.changes.type": (
        "What changed, such as chat.created; docs/changes.md lists the types.",
        "Type of change, such as chat.created; docs/changes.md lists the types.",
    ),
    "COLUMN analytics.changes.session_id": (
        "CallHQ session id; empty where none is known.",
        "CallHQ session id; empty if none is known.",
    ),
    "COLUMN analytics.changes.changed_at": (
        "When it changed.",
        "Time of the change.",
    ),
    "COLUMN analytics.changes.epoch": (
        "Epoch in which its cursor was given, see analytics.epochs; null before any process served the database.",
        "Epoch in which its cursor was assigned, see analytics.epochs; null before any process served the database.",
    ),
    "VIEW analytics.chats": (
        "One row a turn.",
        "One row per turn.",
    ),
    "COLUMN analytics.chats.session_id": (
        "CallHQ session id; empty where no delivery told it.",
        "CallHQ session id; empty for an unassigned turn.",
    ),
    "COLUMN analytics.chats.chat_id": (
        "CallHQ chat id; null where only history knows the turn.",
        "CallHQ chat id; null for a turn known only from history.",
    ),
    "COLUMN analytics.chats.cost": (
        "What the turn cost.",
        "Cost of the turn.",
    ),
    "COLUMN analytics.chats.created_at": (
        "Upstream creation time; null if not told.",
        "Upstream creation time; null if not reported.",
    ),
    "COLUMN analytics.chats.updated_at": (
        "Upstream time of the newest revision; null if not told.",
        "Upstream time of the newest revision; null if not reported.",
    ),
    "COLUMN analytics.chats.source": (
        "Whence it is known: webhook or history.",
        "Source: webhook or history.",
    ),
    "COLUMN analytics.chats.first_received_at": (
        "When we first heard of it.",
        "Arrival of its first event.",
    ),
    "COLUMN analytics.chats.erased_at": (
        "When its content was erased; null if it was not.",
        "Time of its erasure; null if not erased.",
    ),
    "VIEW analytics.conversations": (
        "One row a session.",
        "One row per session.",
    ),
    "COLUMN analytics.conversations.assistant_id": (
        "Assistant, as told last.",
        "Assistant, from the latest report.",
    ),
    "COLUMN analytics.conversations.name": (
        "Name of the session, where told.",
        "Name of the session, if reported.",
    ),
    "COLUMN analytics.conversations.status": (
        "Upstream status, where told.",
        "Upstream status, if reported.",
    ),
    "COLUMN analytics.conversations.started_at": (
        "Creation of its first turn or of the session; where not told, when we first heard of it.",
        "Creation of its first turn or of the session; if not reported, arrival of its first event.",
    ),
    "COLUMN analytics.conversations.cost": (
        "Sum of what its turns cost; null where none told.",
        "Total cost of its turns; null if none reported a cost.",
    ),
    "COLUMN analytics.conversations.reconciled_at": (
        "When its history last told its messages; null if it never did.",
        "Start of the latest reading that returned messages; null if none.",
    ),
    "COLUMN analytics.conversations.erased_at": (
        "When its content was erased; null if it was not.",
        "Time of its erasure; null if not erased.",
    ),
    "VIEW analytics.coverage": (
        "One row a session: how complete it is known to be.",
        "One row per session: its known completeness.",
    ),
    "COLUMN analytics.coverage.first_event_at": (
        "When we first heard of it.",
        "Arrival of its first event.",
    ),
    "COLUMN analytics.coverage.reconciled_at": (
        "When its history last told its messages; null if it never did.",
        "Start of the latest reading that returned messages; null if none.",
    ),
    "COLUMN analytics.coverage.reason": (
        "Code of why it is in that state.",
        "Code of the reason for that state.",
    ),
    "COLUMN analytics.coverage.next_reading_at": (
        "When its history is to be read next; null: never again.",
        "Time of the next reading of its history; null if none is planned.",
    ),
    "VIEW analytics.daily": (
        "One row a day (UTC, by the creation of the turn) and assistant.",
        "One row per day (UTC, by the creation of the turn) and assistant.",
    ),
    "COLUMN analytics.daily.day": (
        "Day in UTC; of a turn that only history knows, the day on which it was first read.",
        "Day in UTC; for a turn known only from history, the day of its first reading.",
    ),
    "COLUMN analytics.daily.assistant_id": (
        "Assistant of the turn, or else of its session; null where not told.",
        "Assistant of the turn, or else of its session; null if unknown.",
    ),
    "COLUMN analytics.daily.cost": (
        "Sum of what the turns cost; null where none told.",
        "Total cost of the turns; null if none reported a cost.",
    ),
    "VIEW analytics.epochs": (
        "One row an epoch of the change feed.",
        "One row per epoch of the change feed.",
    ),
    "COLUMN analytics.epochs.number": (
        "1, 2, 3 …; the last counts.",
        "1, 2, 3 …; the last one is current.",
    ),
    "COLUMN analytics.epochs.epoch": (
        "Its name in analytics.changes.",
        "Name in analytics.changes.",
    ),
    "COLUMN analytics.epochs.began_at": (
        "When it began.",
        "Time of its beginning.",
    ),
    "COLUMN analytics.epochs.cursor": (
        "Newest change that the database had at its beginning.",
        "Newest change in the database at its beginning.",
    ),
    "COLUMN analytics.epochs.given": (
        "Greatest cursor known to be given before it: those after cursor are of changes that the database lost.",
        "Greatest cursor known to be assigned before it: the database lost the changes after cursor.",
    ),
    "COLUMN analytics.health.complete_through": (
        "Up to here every known session is reconciled, except those that the next columns count.",
        "Every known session is reconciled up to this time, except those counted in the next columns.",
    ),
    "COLUMN analytics.health.unknown_sessions": (
        "Sessions whose history CallHQ answered with 404 or 410.",
        "Sessions for whose history CallHQ returned 404 or 410.",
    ),
    "COLUMN analytics.health.lost_sessions": (
        "Sessions with a turn whose content no webhook and no history gave.",
        "Sessions with a turn whose content neither a webhook nor a history delivered.",
    ),
    "VIEW analytics.messages": (
        "One row a message, in the order in which it was said.",
        "One row per message, in the order of the conversation.",
    ),
    "COLUMN analytics.messages.session_id": (
        "CallHQ session id; empty where no delivery told it.",
        "CallHQ session id; empty for an unassigned turn.",
    ),
    "COLUMN analytics.messages.chat_id": (
        "CallHQ chat id; null where only history knows it.",
        "CallHQ chat id; null for a turn known only from history.",
    ),
    "COLUMN analytics.messages.created_at": (
        "Upstream creation time of its turn; null if not told.",
        "Upstream creation time of its turn; null if not reported.",
    ),
    "COLUMN analytics.messages.source": (
        "Whence it is known: webhook or history.",
        "Source: webhook or history.",
    ),
    "COLUMN analytics.messages.in_history": (
        "Whether the latest reading of the history shows it; null where none could.",
        "Whether the latest reading of the history shows it; null if no reading could.",
    ),
    "COLUMN analytics.messages.content_kind": (
        "What content is: text, refusal, tool_call or other.",
        "Kind of content: text, refusal, tool_call or other.",
    ),
    "COLUMN analytics.messages.history_content": (
        (
            "Text of the history where it differs from content; null where it does not, or no history "
            "shows the message."
        ),
        "Text in the history if it differs from content; null otherwise, or if no history shows the message.",
    ),
}


def upgrade() -> None:
    for name, (_, comment) in COMMENTS.items():
        _set_comment(name, comment)


def downgrade() -> None:
    for name, (comment, _) in COMMENTS.items():
        _set_comment(name, comment)


def _set_comment(name: str, comment: str) -> None:
    quoted = comment.replace("'", "''")
    op.execute(f"COMMENT ON {name} IS '{quoted}'")
