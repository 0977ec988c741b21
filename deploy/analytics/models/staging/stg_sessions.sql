-- Every column, so that promoted variables are included.
select
    s.*,
    (s.started_at at time zone 'UTC')::date as started_on,
    extract(epoch from s.last_message_at - s.started_at)::bigint as seconds,
    s.repaired_messages > 0 as is_repaired
from {{ source('callhq', 'sessions') }} as s
