-- Rebuilt as a whole: one row per day and assistant. conversations does not add up over days; conversations_started does.
select
    d.*,
    d.repaired_messages::double precision / nullif(d.messages, 0) as repaired_share,
    d.cost / nullif(d.chats, 0) as cost_per_chat
from {{ ref('stg_daily') }} as d
