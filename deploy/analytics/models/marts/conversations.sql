-- An incremental run replaces the rows of changed conversations, and deletes those of conversations that are no longer
-- archived. It also reads the rows with the greatest known cursor again, because more of them may have been stored since.
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
