select * from {{ source('callhq', 'daily') }}
