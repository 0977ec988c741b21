select day, assistant_id from {{ ref('daily') }} group by day, assistant_id having count(*) > 1
