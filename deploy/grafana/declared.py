"""Which dashboards there are, and what each of their panels asks.

Left out: their JSON (`deploy.grafana.panels`). A series that begins only when something happens stands beside
`vector(0)`: no line would look like no data.
"""

from typing import Final

from deploy.grafana.panels import Dashboard, Prom, Sql, Variable, chart, stat, table


def rate(metric: str, by: str = "", where: str = "") -> str:
    """A sum of rates a second, 0 where nothing has happened yet."""
    grouped = f" by ({by})" if by else ""
    selected = f"{{{where}}}" if where else ""
    return f"sum{grouped} (rate({metric}{selected}[$__rate_interval])) or vector(0)"


def quantiles(metric: str, by: str = "") -> tuple[Prom, ...]:
    """The median, and what one in twenty and one in a hundred exceed."""
    grouped, legend = (f"{by}, le", f" {{{{{by}}}}}") if by else ("le", "")
    return tuple(
        Prom(
            f"histogram_quantile({share}, sum by ({grouped}) (rate({metric}_bucket[$__rate_interval])))",
            f"p{share * 100:.0f}{legend}",
        )
        for share in (0.5, 0.95, 0.99)
    )


def mean(metric: str) -> Prom:
    return Prom(f"sum(rate({metric}_sum[$__rate_interval])) / sum(rate({metric}_count[$__rate_interval]))", "mean")


INGEST: Final = Dashboard(
    "ingest",
    "Sluice: ingest",
    [
        stat("Processes that refuse requests", Prom("sum(sluice_ingest_overloaded)")),
        stat("Server errors", Prom("sluice:ingest_errors:ratio_rate5m"), "percentunit"),
        stat("Records in spools", Prom("sum(sluice_ingest_spool_depth_records)")),
        stat("Records in paced lanes", Prom("sum(sluice_ingest_paced_depth_records)")),
        stat("Open connections", Prom("sum(sluice_ingest_connections)")),
        stat("Credentials last read", Prom("max(sluice_ingest_registry_age_seconds)"), "s"),
        chart("Requests by status", Prom(rate("sluice_ingest_requests_total", "status"), "{{status}}"), unit="reqps"),
        chart("Requests by route", Prom(rate("sluice_ingest_requests_total", "route"), "{{route}}"), unit="reqps"),
        chart("Readings", Prom(rate("sluice_ingest_readings_total", "outcome"), "{{outcome}}"), unit="cps"),
        chart(
            "Readings refused, by reason",
            Prom(rate("sluice_ingest_readings_total", "reason", 'outcome="refused"'), "{{reason}}"),
            unit="cps",
        ),
        chart("From a request to durable", *quantiles("sluice_ingest_append_seconds"), unit="s"),
        chart("How late the event loop is", *quantiles("sluice_ingest_loop_lag_seconds"), unit="s"),
        chart("Bodies", Prom(rate("sluice_ingest_body_bytes_total"), "unpacked"), unit="Bps"),
        chart(
            "In work",
            Prom("sum(sluice_ingest_in_flight_bytes)", "bodies"),
            Prom("sum(sluice_ingest_log_queued_bytes)", "records on their way to the log"),
            unit="bytes",
        ),
        chart(
            "Spool",
            Prom("sum(sluice_ingest_spool_depth_bytes)", "waiting"),
            Prom("sum(sluice_ingest_paced_depth_bytes)", "waiting in the paced lane"),
            unit="bytes",
        ),
        chart(
            "Age of the oldest record",
            Prom("max(sluice_ingest_spool_age_seconds)", "spool"),
            Prom("max(sluice_ingest_paced_age_seconds)", "paced lane"),
            unit="s",
        ),
        chart(
            "Requests over a limit",
            Prom(rate("sluice_ingest_limited_requests_total", "limit, scope"), "{{scope}} {{limit}}"),
            unit="reqps",
        ),
        chart("Messages", Prom(rate("sluice_mqtt_messages_total", "result"), "{{result}}"), unit="cps"),
        chart(
            "Messages in work",
            Prom("sum(sluice_mqtt_in_flight_messages)", "not acknowledged"),
            Prom("sum(sluice_mqtt_held_messages)", "of those, waiting for a look-up or a limit"),
            Prom("max(sluice_mqtt_broker_stored_messages)", "kept by the broker"),
        ),
        chart("From a message to durable", *quantiles("sluice_mqtt_acknowledge_seconds"), unit="s"),
        chart(
            "Sessions with the broker",
            Prom("sum(sluice_mqtt_sessions_leased)", "leased"),
            Prom("sum(sluice_mqtt_sessions)", "connected"),
            Prom(rate("sluice_mqtt_connections_ended_total"), "ended a second"),
        ),
        chart(
            "Messages that were repeated or dropped",
            Prom(rate("sluice_mqtt_repeated_messages_total"), "repeated by the broker"),
            Prom(rate("sluice_mqtt_unacknowledged_messages_total"), "left to the broker"),
            Prom("max(delta(sluice_mqtt_broker_dropped_messages[$__rate_interval]))", "dropped by the broker"),
            unit="cps",
        ),
        chart("Snapshots of plants", Prom(rate("sluice_mqtt_snapshots_total", "result"), "{{result}}"), unit="cps"),
        chart("Commands to devices", Prom(rate("sluice_commands_total", "outcome"), "{{outcome}}"), unit="cps"),
        chart(
            "Commands that wait",
            Prom("max(sluice_commands_waiting)", "waiting"),
            Prom("sum(sluice_commands_connected)", "workers connected to the broker"),
        ),
        chart("From asked for to the broker", *quantiles("sluice_commands_sent_seconds"), unit="s"),
        chart("Clients of the broker", Prom("max by (state) (sluice_broker_clients)", "{{state}}")),
        chart(
            "What was brought to the broker",
            Prom(rate("sluice_broker_changes_total", "kind"), "{{kind}}"),
            Prom(rate("sluice_broker_failures_total", "part"), "failed: {{part}}"),
            unit="cps",
        ),
        chart(
            "How old what the broker knows is",
            Prom("time() - max(sluice_broker_agreed_timestamp_seconds)", "since it was as the registry says"),
            Prom("min(sluice_broker_crl_next_update_timestamp_seconds) - time()", "until its revocation list ends"),
            unit="s",
        ),
        chart(
            "Connections turned away",
            Prom(
                rate("sluice_http_refused_connections_total", "reason", 'listener=~"ingest|up"'),
                "{{reason}}",
            ),
            unit="cps",
        ),
    ],
)

LANDING: Final = Dashboard(
    "landing",
    "Sluice: landing",
    [
        stat("Records waiting", Prom("sluice:landing_lag_records:sum")),
        stat("Partitions held", Prom("sum(sluice_worker_partitions_held)")),
        stat("Partitions of the log", Prom("max(sluice_log_partitions)")),
        stat("Waiting for an upgrade", Prom("sum(sluice_landing_waiting_for_upgrade)")),
        stat("Rejected records", Prom("sum(sluice_landing_rejected_records_total)")),
        stat("Undecodable records", Prom("sum(sluice_landing_undecodable_total)")),
        chart("Records landed", Prom(rate("sluice_landing_records_total"), "landed"), unit="cps"),
        chart("Readings by outcome", Prom(rate("sluice_landing_rows_total", "outcome"), "{{outcome}}"), unit="cps"),
        chart("From arrival to COMMIT", *quantiles("sluice_landing_receipt_to_commit_seconds"), unit="s"),
        chart("A transaction", *quantiles("sluice_landing_batch_seconds"), unit="s"),
        chart("Readings of a transaction", mean("sluice_landing_batch_rows")),
        chart("Bytes of a transaction", mean("sluice_landing_batch_bytes"), unit="bytes"),
        chart(
            "Waiting, by partition",
            Prom("sum by (partition) (sluice_landing_lag_records)", "partition {{partition}}"),
        ),
        chart("Attempts made again", Prom(rate("sluice_landing_retries_total", "cause"), "{{cause}}"), unit="cps"),
        chart(
            "Changes of holders",
            Prom(rate("sluice_worker_assignments_total", "event"), "{{event}}"),
            Prom(rate("sluice_worker_sessions_ended_total"), "sessions ended"),
            unit="cps",
        ),
        chart(
            "Lease renewals", Prom(rate("sluice_worker_lease_renewals_total", "outcome"), "{{outcome}}"), unit="cps"
        ),
    ],
)

LOG: Final = Dashboard(
    "log",
    "Sluice: log",
    [
        stat("Partitions", Prom("max(sluice_log_partitions)")),
        stat("Records near their deletion", Prom("max(sluice_ingest_expiring_records)")),
        stat("Processes that refuse for it", Prom("sum(sluice_ingest_retention_refusing)")),
        stat("Records lost in the log", Prom('max(sluice_ledger_lost_records{where="log"})')),
        stat("Records lost in spools", Prom('max(sluice_ledger_lost_records{where="spool"})')),
        stat("Partitions that spool", Prom("sum(sluice_ingest_spool_partitions)")),
        chart("Records appended", Prom(rate("sluice_ingest_records_total", "outcome"), "{{outcome}}"), unit="cps"),
        chart("Records landed", Prom(rate("sluice_landing_records_total"), "landed"), unit="cps"),
        chart("Time of an append", *quantiles("sluice_ingest_append_seconds"), unit="s"),
        chart("Records waiting", Prom("sum(sluice_landing_lag_records)", "in the log")),
        chart("Spool", Prom(rate("sluice_ingest_spool_records_total", "outcome"), "{{outcome}}"), unit="cps"),
        chart("Paced lane", Prom(rate("sluice_ingest_paced_records_total", "outcome"), "{{outcome}}"), unit="cps"),
        chart("Landed before", Prom(rate("sluice_landing_repeats_total"), "drained, replayed or named again")),
        chart("Bytes not yet durable", Prom("sum(sluice_ingest_log_queued_bytes)", "queued"), unit="bytes"),
    ],
)

STORE: Final = Dashboard(
    "store",
    "Sluice: store, roll-ups, retention, books and quarantine",
    [
        stat(
            "Unaccounted readings", Prom("max(sluice_ledger_unaccounted_readings)"), what="Anything but 0 is a fault."
        ),
        stat("Held in quarantine", Prom("max(sluice_quarantine_held_rows)")),
        stat("Series in memory", Prom("sum(sluice_landing_series_cached)")),
        stat("Received in a day", Prom('max(sluice_ledger_readings{outcome="received"})')),
        stat("Stored in a day", Prom('max(sluice_ledger_readings{outcome="stored"})')),
        stat("Lost records", Prom("sum(max by (where) (sluice_ledger_lost_records))")),
        chart("What became of a day's readings", Prom("max by (outcome) (sluice_ledger_readings)", "{{outcome}}")),
        chart(
            "Readings written",
            Prom(rate("sluice_landing_rows_total", "path, outcome"), "{{path}} {{outcome}}"),
            unit="cps",
        ),
        chart("A transaction", *quantiles("sluice_landing_batch_seconds"), unit="s"),
        chart("Series made", Prom(rate("sluice_landing_series_created_total"), "made"), unit="cps"),
        chart(
            "Set aside",
            Prom(rate("sluice_landing_refused_total"), "refused at the door"),
            Prom(rate("sluice_landing_rows_total", "outcome", 'outcome=~"conflict|quarantined"'), "{{outcome}}"),
            Prom(rate("sluice_quarantine_expired_total"), "expired"),
            unit="cps",
        ),
        chart("Quarantine", Prom("max(sluice_quarantine_held_rows)", "held")),
        stat("Roll-ups behind the present", Prom("max(sluice_rollups_lag_seconds)"), "s"),
        stat("Ranges to repair", Prom("max(sluice_rollups_marks)")),
        stat(
            "First of them waits for",
            Prom("max(sluice_rollups_oldest_mark_seconds)"),
            "s",
            what="60 s is the promise.",
        ),
        stat("Chunks beyond retention", Prom("sum(max by (why) (sluice_retention_waiting_chunks))")),
        stat("Chunks with rows to delete", Prom("max(sluice_retention_waiting_shares)")),
        stat("Last pass of retention", Prom("time() - max(sluice_retention_passed_timestamp_seconds)"), "s"),
        chart("How far roll-ups are behind", Prom("max(sluice_rollups_lag_seconds)", "behind the present"), unit="s"),
        chart("Repairs: ranges marked", Prom("max(sluice_rollups_marks)", "waiting")),
        chart("Repairs: age", Prom("max(sluice_rollups_oldest_mark_seconds)", "of the first"), unit="s"),
        chart("Roll-ups written", Prom(rate("sluice_rollups_rows_total", "tier"), "{{tier}}"), unit="cps"),
        chart(
            "Time of roll-ups' passes",
            Prom(rate("sluice_rollups_pass_seconds_sum", "kind"), "{{kind}}"),
            unit="percentunit",
            what="Seconds in a second, of all workers.",
        ),
        chart(
            "Roll-ups that waited for a transaction too long",
            Prom(rate("sluice_rollups_unsettled_total"), "passes"),
            unit="cps",
        ),
        chart("The oldest chunk", Prom("max by (tier) (sluice_retention_oldest_seconds)", "{{tier}}"), unit="s"),
        chart("Beyond retention, by why", Prom("max by (why) (sluice_retention_waiting_chunks)", "{{why}}")),
        chart(
            "Chunks with rows to delete, over time",
            Prom("max(sluice_retention_waiting_shares)", "waiting"),
            what="Of organisations that keep less than others.",
        ),
        chart("Rows deleted one by one", Prom(rate("sluice_retention_rows_total", "kind"), "{{kind}}"), unit="cps"),
        chart("Dropped with chunks", Prom(rate("sluice_retention_bytes_total", "tier"), "{{tier}}"), unit="Bps"),
    ],
)

API: Final = Dashboard(
    "api",
    "Sluice: API",
    [
        stat("Server errors", Prom("sluice:api_errors:ratio_rate5m"), "percentunit"),
        stat("Requests in work", Prom("sum(sluice_api_requests_in_flight)")),
        stat("Handed out since the start", Prom("sum(sluice_api_readings_total)")),
        stat("Streams", Prom("sum(sluice_api_live_listeners)")),
        stat("Records that streams are behind", Prom("max(sluice_api_live_lag_records)")),
        stat("Waiting to be read", Prom("sum(sluice_api_live_queued_bytes)"), "bytes"),
        chart("Requests by status", Prom(rate("sluice_api_requests_total", "status"), "{{status}}"), unit="reqps"),
        chart("Requests by route", Prom(rate("sluice_api_requests_total", "route"), "{{route}}"), unit="reqps"),
        chart("Time of an answer", *quantiles("sluice_api_request_seconds"), unit="s"),
        chart("Time of an answer by route", *quantiles("sluice_api_request_seconds", "route"), unit="s"),
        chart("Readings handed out", Prom(rate("sluice_api_readings_total"), "readings"), unit="cps"),
        chart(
            "Connections turned away",
            Prom(rate("sluice_http_refused_connections_total", "reason", 'listener=~"api|up"'), "{{reason}}"),
            unit="cps",
        ),
        chart("Streams sent", Prom(rate("sluice_api_live_events_total"), "events with readings"), unit="cps"),
        chart(
            "From arrival at ingest to a stream's event",
            *quantiles("sluice_api_live_delay_seconds"),
            unit="s",
            what="Of the last record of each turn.",
        ),
        chart(
            "Streams ended",
            Prom(rate("sluice_api_live_ended_total", "reason"), "{{reason}}"),
            unit="cps",
            what="`slow` was cut off and comes back by its id; `gone` left.",
        ),
        chart("Streams refused", Prom(rate("sluice_api_live_refused_total", "reason"), "{{reason}}"), unit="cps"),
        chart(
            "Records that have landed and were not told yet",
            Prom("sum by (instance) (sluice_api_live_lag_records)", "{{instance}}"),
        ),
        chart("Streams open", Prom("sum by (instance) (sluice_api_live_listeners)", "{{instance}}")),
    ],
)

PROCESSES: Final = Dashboard(
    "processes",
    "Sluice: processes",
    [
        stat("Alerts that fire", Prom('count(ALERTS{alertstate="firing"}) or vector(0)')),
        stat("Targets away", Prom('count(up{job=~"sluice-.*"} == 0) or vector(0)')),
        stat("Processes started again", Prom("sum(sluice_process_restarts_total) or vector(0)")),
        chart("Up", Prom('sum by (job) (up{job=~"sluice-.*"})', "{{job}}")),
        chart("Not ready", Prom("sum by (job, check) (sluice_not_ready)", "{{job}} {{check}}")),
        chart("Noted", Prom("sum by (job, note) (sluice_noted) or vector(0)", "{{job}} {{note}}")),
        chart(
            "Ready processes of roles with several",
            Prom("sum by (job) (sluice_processes_ready) or vector(0)", "{{job}}"),
        ),
        chart(
            "CPU",
            Prom(
                'rate(process_cpu_seconds_total{job=~"sluice-.*"}[$__rate_interval])',
                "{{job}} {{process}}",
            ),
            unit="percentunit",
        ),
        chart("Memory", Prom('process_resident_memory_bytes{job=~"sluice-.*"}', "{{job}} {{process}}"), unit="bytes"),
        chart("Open files", Prom('process_open_fds{job=~"sluice-.*"}', "{{job}} {{process}}")),
        chart("Age", Prom('time() - process_start_time_seconds{job=~"sluice-.*"}', "{{job}} {{process}}"), unit="s"),
    ],
)

_SITE: Final = Variable(
    "site",
    "Site",
    "SELECT site AS __text, site_id::text AS __value FROM dashboards.sites UNION ALL SELECT '(none)', ''",
)

FLEET: Final = Dashboard(
    "fleet",
    "Sluice: fleet",
    [
        stat(
            "Devices",
            Sql(
                "SELECT count(*) FROM dashboards.devices WHERE removed_at IS NULL"
                " AND coalesce(site_id::text, '') IN (${site:sqlstring})"
            ),
        ),
        stat(
            "Online",
            Sql(
                "SELECT count(*) FROM dashboards.devices WHERE online AND removed_at IS NULL"
                " AND coalesce(site_id::text, '') IN (${site:sqlstring})"
            ),
        ),
        stat(
            "Silent",
            Sql(
                "SELECT count(*) FROM dashboards.devices WHERE NOT online AND removed_at IS NULL"
                " AND coalesce(site_id::text, '') IN (${site:sqlstring})"
            ),
        ),
        table(
            "By site",
            Sql(
                "SELECT site, count(*) AS devices, count(*) FILTER (WHERE online) AS online"
                " FROM dashboards.devices WHERE removed_at IS NULL"
                " AND coalesce(site_id::text, '') IN (${site:sqlstring})"
                " GROUP BY site ORDER BY site"
            ),
        ),
        table(
            "By model and firmware",
            Sql(
                "SELECT model, fw_version, count(*) AS devices, count(*) FILTER (WHERE online) AS online"
                " FROM dashboards.devices WHERE removed_at IS NULL"
                " AND coalesce(site_id::text, '') IN (${site:sqlstring})"
                " GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2"
            ),
        ),
        table(
            "Silent longest",
            Sql(
                "SELECT device, local_id, site, model, last_seen_at FROM dashboards.devices"
                " WHERE NOT online AND removed_at IS NULL AND coalesce(site_id::text, '') IN (${site:sqlstring})"
                " ORDER BY last_seen_at NULLS FIRST, device LIMIT 100"
            ),
        ),
        chart(
            "Requests of devices", Prom(rate("sluice_ingest_requests_total", "status"), "{{status}}"), unit="reqps"
        ),
        chart(
            "Who is asking",
            Prom(rate("sluice_ingest_credential_lookups_total", "result"), "{{result}}"),
            unit="reqps",
            what="Uses of tokens: known, known as unknown, or asked for in the database.",
        ),
    ],
    [_SITE],
    tags=("sluice", "operators", "organisation"),
)

READINGS: Final = Dashboard(
    "readings",
    "Readings",
    [
        chart(
            "Readings",
            Sql(
                "SELECT $__timeGroupAlias(time, $__interval), concat_ws(' ', device, nullif(label, '')) AS metric,"
                " avg(value) AS value FROM dashboards.readings WHERE $__timeFilter(time)"
                " AND device_id IN (${device:sqlstring}) AND metric = ${metric:sqlstring}"
                " GROUP BY 1, 2 ORDER BY 1"
            ),
            what="The mean of each interval. Narrow the time: what is asked for is read.",
        ),
        chart(
            "How many",
            Sql(
                "SELECT $__timeGroupAlias(time, $__interval), device AS metric, count(*) AS value"
                " FROM dashboards.readings WHERE $__timeFilter(time)"
                " AND device_id IN (${device:sqlstring}) AND metric = ${metric:sqlstring}"
                " GROUP BY 1, 2 ORDER BY 1"
            ),
        ),
        table(
            "In this time",
            Sql(
                "SELECT device, label, unit, count(*) AS readings, min(value), avg(value) AS mean, max(value)"
                " FROM dashboards.readings WHERE $__timeFilter(time)"
                " AND device_id IN (${device:sqlstring}) AND metric = ${metric:sqlstring}"
                " GROUP BY 1, 2, 3 ORDER BY 1, 2"
            ),
        ),
        table(
            "Newest values",
            Sql(
                "SELECT device, metric, label, coalesce(text_value, value::text) AS value, unit, time"
                " FROM dashboards.latest WHERE device_id IN (${device:sqlstring}) ORDER BY device, metric, label"
            ),
        ),
        table(
            "Texts",
            Sql(
                "SELECT time, device, metric, label, value FROM dashboards.text_readings"
                " WHERE $__timeFilter(time) AND device_id IN (${device:sqlstring}) ORDER BY time DESC LIMIT 200"
            ),
        ),
        table(
            "Devices",
            Sql(
                "SELECT device, site, model, online, last_seen_at FROM dashboards.devices"
                " WHERE device_id IN (${device:sqlstring}) ORDER BY device"
            ),
        ),
    ],
    [
        _SITE,
        Variable(
            "device",
            "Device",
            "SELECT device AS __text, device_id::text AS __value FROM dashboards.devices"
            " WHERE removed_at IS NULL AND coalesce(site_id::text, '') IN (${site:sqlstring}) ORDER BY device",
        ),
        Variable(
            "metric",
            "Metric",
            "SELECT DISTINCT metric FROM dashboards.latest"
            " WHERE device_id IN (${device:sqlstring}) AND text_value IS NULL ORDER BY metric",
            several=False,
        ),
    ],
    since="now-24h",
    tags=("sluice", "organisation"),
)

DASHBOARDS: Final = (INGEST, LANDING, LOG, STORE, API, PROCESSES, FLEET, READINGS)
