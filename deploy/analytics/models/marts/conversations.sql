-- An incremental run replaces the rows of the conversations that changed, and deletes those that are not archived any
-- more. The greatest cursor is read again, because a row may have been stored late under it.
{{
    config(
        materialized='incremental',
        incremental_strategy='delete+insert',
        unique_key='session_id',
        on_schema_change='append_new_columns',
        indexes=[{'columns': ['session_id'], 'unique': true}, {'columns': ['changed_cursor']}, {'columns': ['started_at']}],
        post_hook="delete from {{ this }} as own where not exists (
            select from {{ source('callhq', 'sessions') }} as s where s.session_id = own.session_id)",
    )
}}
select * from {{ ref('stg_sessions') }}
{% if is_incremental() %}
where changed_cursor >= (select coalesce(max(changed_cursor), 0) from {{ this }})
{% endif %}
