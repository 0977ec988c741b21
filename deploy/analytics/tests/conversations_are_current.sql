-- Conversations that did not change since the last run, and are missing or different.
select s.session_id
from {{ source('callhq', 'sessions') }} as s
left join {{ ref('conversations') }} as c on c.session_id = s.session_id
where s.changed_cursor < (select max(changed_cursor) from {{ ref('conversations') }})
    and (c.session_id is null or c.changed_cursor <> s.changed_cursor or c.messages <> s.messages)
