"""The alert and recording rules, by promtool: each fires on its cause and clears when that is gone."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.conftest import CHECKOUT
from tests.prometheus import CONFIG, DIRECTORY, RULES, alerts, promtool, rules, unknown_metrics

LABELS = {"job": "sluice-worker", "instance": "a:1"}


@dataclass(frozen=True)
class Case:
    """Series a minute apart, when the alert fires with which labels and description, and when it has cleared."""

    alert: str
    series: dict[str, str]
    fires_at: str
    description: str
    clears_at: str
    labels: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.alert


def errors(role: str, bad: str) -> dict[str, str]:
    """100 requests a minute, of which so many fail."""
    return {
        f'sluice_{role}_requests_total{{status="200"}}': "0+100x3000",
        f'sluice_{role}_requests_total{{status="503"}}': bad,
    }


def buckets(name: str, slow: str, fast: str, labels: str = "") -> dict[str, str]:
    """A histogram with buckets at 1 s, 100 s and +Inf, into which observations go as `slow` and `fast` say."""
    return {
        f'{name}_bucket{{{labels}le="1"}}': fast,
        f'{name}_bucket{{{labels}le="100"}}': slow,
        f'{name}_bucket{{{labels}le="+Inf"}}': slow,
    }


UP = 'up{job="%s", instance="a:1"}'
CASES = [
    Case("SluiceIngestDown", {UP % "sluice-ingest": "1 0 0 0 1"}, "2m",
         "All targets of sluice-ingest are away (up is 0). Devices cannot send.", "4m", {"job": "sluice-ingest"}),
    Case("SluiceWorkerDown", {UP % "sluice-worker": "1 0 0 0 0 1"}, "3m",
         "All targets of sluice-worker are away (up is 0). Nothing lands; the log keeps what was acknowledged.", "5m",
         {"job": "sluice-worker"}),
    Case("SluiceApiDown", {UP % "sluice-api": "1 0 0 0 0 1"}, "3m",
         "All targets of sluice-api are away (up is 0). Nobody can read, and the registry cannot be changed.", "5m",
         {"job": "sluice-api"}),
    Case("SluiceBridgeDown", {UP % "sluice-bridge": "1 0 0 0 0 1"}, "3m",
         "All targets of sluice-bridge are away (up is 0). Nothing that devices publish is taken; the broker keeps"
         " it.",
         "5m", {"job": "sluice-bridge"}),
    Case("SluiceBridgeDisconnected",
         {"sluice_mqtt_sessions_leased": "2x20", "sluice_mqtt_sessions": "2 1 1 1 1 2x10"}, "4m",
         "1 sessions take nothing; the broker keeps what is published for them.", "6m"),
    Case("SluiceBridgeUnacknowledged", {"sluice_mqtt_oldest_seconds": "0 130 190 250 310 0x10"}, "4m",
         "The oldest message waits for 5m 10s; when as many wait as may, nothing more is taken.", "6m"),
    Case("SluiceBridgeFlapping", {'sluice_mqtt_connections_ended_total{family="readings"}': "0+2x10 20x40"}, "10m",
         "20 connections for readings ended within 15 minutes.", "40m", {"family": "readings"}),
    Case("SluiceBrokerSessionLost", {'sluice_mqtt_sessions_lost_total{family="readings"}': "0x5 1x100"}, "10m",
         "1 sessions of readings were gone within the hour, and with them what the broker kept for them.", "90m",
         {"family": "readings"}),
    Case("SluiceBrokerDropping", {"sluice_mqtt_broker_dropped_messages": "0x5 50x30"}, "6m",
         "54.17 messages were dropped within ten minutes, before any bridge saw them.", "30m"),
    Case("SluiceBadSignatures",
         {'sluice_mqtt_snapshots_total{result="bad_signature"}': "0+1x60 60x30",
          'sluice_mqtt_snapshots_total{result="signed"}': "0+100x90"}, "50m",
         "50 snapshots were quarantined as bad_signature within the hour, and more still are.", "77m"),
    Case("SluiceCommandsWaiting", {"sluice_commands_oldest_seconds": "0 70 130 190 250 0x10"}, "4m",
         "The first of the commands that could be sent has waited for 4m 10s; they time out in the end.", "6m"),
    Case("SluiceBrokerKeeperDown", {UP % "sluice-broker": "1 0 0 0 0 1"}, "3m",
         "All targets of sluice-broker are away (up is 0). Who is suspended or revoked stays connected.", "5m",
         {"job": "sluice-broker"}),
    Case("SluiceBrokerBehind", {"sluice_broker_agreed_timestamp_seconds": "0 60 60 60 60 300x10"}, "4m",
         "It was last as the registry says 3m 0s ago. Who is suspended or revoked may still be connected.", "5m"),
    Case("SluiceBrokerClientsLeftOut", {'sluice_broker_clients{state="waiting"}': "0 2x8 0"}, "6m",
         "2 clients of the registry cannot log in at the broker (waiting).", "10m", {"state": "waiting"}),
    Case("SluiceRevocationListOld", {"sluice_broker_crl_next_update_timestamp_seconds": "0 345600x9 604800x9"}, "7m",
         "It ends in 3d 23h 53m 0s; from then on the broker lets no certificate in.", "11m"),
    Case("SluiceTargetDown",
         {UP % "sluice-worker": "0x20 1", 'up{job="sluice-worker", instance="b:1"}': "1x30"}, "15m",
         "a:1 of sluice-worker has been away for ten minutes (up is 0).", "21m", LABELS),
    Case("SluiceProcessRestarts",
         {'sluice_process_restarts_total{job="sluice-worker", instance="a:1"}': "0 1 2 3 4 4x40"}, "6m",
         "A process of sluice-worker on a:1 was started 4 times within 15 minutes.", "40m", LABELS),
    Case("SluiceProcessRestarts",
         {'process_start_time_seconds{job="sluice-worker", instance="a:1"}': "1 2 3 4 4x40"}, "5m",
         "A process of sluice-worker on a:1 was started 3 times within 15 minutes.", "40m", LABELS),
    Case("SluiceNotReady",
         {'sluice_not_ready{check="landing", job="sluice-worker", instance="a:1"}': "0 1x10 0x10"}, "8m",
         "1 processes of sluice-worker on a:1 are not ready: landing.", "15m", LABELS | {"check": "landing"}),
    Case("SluiceDatabaseUnavailable",
         {'sluice_not_ready{check="database", job="sluice-api", instance="a:1"}': "0 1x5 0x10"}, "4m",
         "sluice-api cannot ask the database, by 1 signs. Acknowledged readings wait in the log.", "10m",
         {"job": "sluice-api"}),
    Case("SluiceDatabaseUnavailable",
         {'sluice_noted{note="credentials", job="sluice-ingest", instance="a:1"}': "0 2x5 0x10"}, "4m",
         "sluice-ingest cannot ask the database, by 1 signs. Acknowledged readings wait in the log.", "10m",
         {"job": "sluice-ingest"}),
    Case("SluiceDatabaseUnavailable",
         {'sluice_worker_lease_renewals_total{outcome="failed", job="sluice-worker"}': "0+20x5 100x15"}, "4m",
         "sluice-worker cannot ask the database, by 1 signs. Acknowledged readings wait in the log.", "10m",
         {"job": "sluice-worker"}),
    Case("SluiceMemory", {'process_resident_memory_bytes{job="sluice-worker", instance="a:1"}': "3e9x20 1e8x5"},
         "16m",
         "A process of sluice-worker on a:1 uses 2.794GiB.", "25m", LABELS),
    Case("SluiceConnectionsRefused",
         {'sluice_http_refused_connections_total{job="sluice-ingest", listener="ingest", reason="address"}':
          "0+60x20 1200x20"}, "15m",
         "sluice-ingest turns away 1 connections a second at ingest (address).", "35m",
         {"job": "sluice-ingest", "listener": "ingest", "reason": "address"}),
    Case("SluiceIngestErrorsFast", errors("ingest", "0+10x60 600x400"), "60m",
         "9.091% of the requests get a 5xx: a month's worth of errors (0.1 %) within days.", "420m"),
    Case("SluiceIngestErrorsSlow", errors("ingest", "0+1x1500 1500x1500"), "1450m",
         "0.9901% of the requests of the last two hours got a 5xx, and of the day no fewer than 0.3 %;"
         " 0.1 % is the aim.", "2000m"),
    Case("SluiceIngestOverloaded", {"sluice_ingest_overloaded": "0 1x5 0x10"}, "4m",
         "1 processes refuse requests because their event loop is late.", "10m"),
    Case("SluiceIngestSlow", buckets("sluice_ingest_append_seconds", "0+60x60", "0x20 0+60x40"), "18m",
         "One request in a hundred waits 1m 39s or longer for the log.", "60m"),
    Case("SluiceCredentialsStale", {"sluice_ingest_registry_age_seconds": "0 60 120 180 0x10"}, "3m",
         "Changes were last read 3m 0s ago: a revoked token still works where it is known.", "6m"),
    Case("SluiceCredentialsExpiring", {"sluice_ingest_registry_age_seconds": "50000x5 0x10"}, "2m",
         "Changes of credentials were last read 13h 53m 20s ago; after a day (SLUICE_CREDENTIAL_GRACE_S) known tokens"
         " count no more.", "8m"),
    Case("SluiceSpoolUsed", {"sluice_ingest_spool_depth_records": "0 5000x10 0x10"}, "8m",
         "5k records wait on ingest's disk: the log cannot be reached, or the spool drains.", "15m"),
    Case("SluiceSpoolGrowing", {"sluice_ingest_spool_depth_bytes": "2e8+1048576x40 241943040-10000000x20"}, "35m",
         "225.7MiB wait in the spool, and more comes in than drains.", "60m"),
    Case("SluiceSpoolOld", {"sluice_ingest_spool_age_seconds": "46800x10 0x10"}, "8m",
         "The oldest record has waited 13h 0m 0s; after three days (SLUICE_SPOOL_AGE_MAX_S) requests get 503.",
         "15m"),
    Case("SluiceSpoolDamaged", {'sluice_ingest_spool_damaged_files_total{instance="a:1"}': "0 0 1x100"}, "4m",
         "1 spool files of a:1 were found damaged within the hour.", "90m", {"instance": "a:1"}),
    Case("SluicePacedLaneOld", {"sluice_ingest_paced_age_seconds": "46800x10 0x10"}, "8m",
         "The oldest record has waited 13h 0m 0s; after a day (SLUICE_PACED_AGE_MAX_S) its sender gets 429.", "15m"),
    Case("SluicePacedLaneFull", {'sluice_ingest_paced_depth_bytes{instance="a:1"}': "4.5e8x10 0x10"}, "8m",
         "429.2MiB wait on a:1; a process takes 500 MB (SLUICE_PACED_BYTES_MAX), then 429.", "15m",
         {"instance": "a:1"}),
    Case("SluiceLogRetentionNear", {"sluice_ingest_expiring_records": "0 1200x10 0x10"}, "8m",
         "1.2k records have used up half of the time after which ingest refuses readings.", "15m"),
    Case("SluiceLogRetentionRefusing", {"sluice_ingest_retention_refusing": "0 2x10 0x10"}, "3m",
         "2 processes answer 503: the log is about to delete what has not landed.", "15m"),
    Case("SluiceLandingBehind",
         {'sluice_landing_lag_records{partition="0"}': "0 50000x20 0x20", "sluice_landing_records_total": "0+60x50"},
         "18m", "50k records have not landed, more than ten minutes of work at the present rate.", "30m"),
    Case("SluiceLandingSlow",
         buckets("sluice_landing_receipt_to_commit_seconds", "0+60x60", "0x20 0+60x40")
         | {"sluice_ingest_spool_depth_records": "0x60", "sluice_ingest_paced_depth_records": "0x60"}, "18m",
         "What lands was received up to 1m 39s ago, and neither the spool nor the paced lane explains it.", "60m"),
    Case("SluiceLandingStopped",
         {'sluice_landing_lag_records{partition="0"}': "0 70x20", 'sluice_landing_records_total': "10x15 20+10x20"},
         "14m", "70 records wait, and none has landed for five minutes.", "22m"),
    Case("SluiceNothingLands",
         {'sluice_ingest_records_total{outcome="durable"}': "0+120x60", "sluice_ingest_spool_partitions": "0x60",
          "sluice_landing_records_total": "10x30 10+120x30"}, "20m",
         "2 records a second are acknowledged, and none lands.", "40m"),
    Case("SluicePartitionStuck",
         {'sluice_landing_lag_records{partition="3"}': "0 70x40 0x10",
         "sluice_landing_records_total": "0+120x60"}, "35m",
         "70 records of partition 3 wait, and their number does not fall.", "45m", {"partition": "3"}),
    Case("SluicePartitionsUnheld",
         {"sluice_log_partitions": "12x20", "sluice_worker_partitions_held": "12 8x5 12x10"}, "4m",
         "4 partitions of the log are not being landed.", "10m"),
    Case("SluicePartitionsUnheld", {"sluice_log_partitions": "12x20", "sluice_worker_partitions_held": "_x9 12x10"},
         "4m", "12 partitions of the log are not being landed.", "15m"),
    Case("SluiceWaitingForUpgrade", {"sluice_landing_waiting_for_upgrade": "0 1x10 0x10"}, "8m",
         "1 partitions stand at a record of a newer version than their worker reads.", "15m"),
    Case("SluiceLandingRetries", {'sluice_landing_retries_total{cause="content"}': "0+30x40 1200x30"}, "30m",
         "500m attempts a second are given up, because of: content.", "60m", {"cause": "content"}),
    Case("SluiceRollupsBehind",
         {"sluice_rollups_lag_seconds": "2400x20 300x20", 'sluice_landing_lag_records{partition="0"}': "1x40"}, "15m",
         "Roll-ups end 40m 0s ago while landing keeps up; what is newer is answered from readings.", "25m"),
    Case("SluiceRollupsUnsettled", {'sluice_rollups_unsettled_total{instance="a:1"}': "0+1x20 20x30"}, "18m",
         "10 passes within ten minutes gave up waiting for an older transaction.", "40m", {"instance": "a:1"}),
    Case("SluiceRollupRepairsSlow", {"sluice_rollups_oldest_mark_seconds": "90x10 0x10"}, "8m",
         "The first mark has waited 1m 30s; a minute is the promise.", "15m"),
    Case("SluiceRetentionStuck", {'sluice_retention_waiting_chunks{why="locked"}': "6x2900 0x100"}, "2890m",
         "6 chunks that nobody keeps any more have stood for two days (locked).", "2910m", {"why": "locked"}),
    Case("SluiceRetentionRowsStay", {"sluice_retention_waiting_shares": "3x2900 0x100"}, "2890m",
         "Of 3 chunks that others keep, rows of an organisation that does not have stood for two days.", "2910m"),
    Case("SluiceRetentionStopped", {'sluice_retention_passed_timestamp_seconds{instance="a:1"}': "60x400 24000x50",
                                    'sluice_retention_passed_timestamp_seconds{instance="b:1"}': "0x450"}, "380m",
         "The last pass ended 6h 19m 0s ago; one an hour is the rule (SLUICE_RETENTION_CHECK_S).", "410m"),
    Case("SluiceLiveUnavailable", {'sluice_noted{note="streams", instance="a:1"}': "0 2x10 0x10"}, "8m",
         "2 processes of a:1 cannot follow the log; queries go on.", "15m", {"instance": "a:1"}),
    Case("SluiceLiveRefused", {'sluice_api_live_refused_total{reason="organisation"}': "0+10x20 200x40",
                               'sluice_api_live_refused_total{reason="unavailable"}': "0+10x60"}, "18m",
         "150 streams were refused within 15 minutes: as many are open as may be (organisation).", "50m",
         {"reason": "organisation"}),
    Case("SluiceLiveSlow", {'sluice_api_live_ended_total{reason="slow"}': "0+10x20 200x40",
                            'sluice_api_live_ended_total{reason="gone"}': "0+10x60"}, "18m",
         "150 streams were ended within 15 minutes because what waited for them was not read.", "50m"),
    Case("SluiceLiveBehind", {'sluice_api_live_lag_records{instance="a:1"}': "0 20000x10 500x10"}, "8m",
         "a:1 has 20k landed records to tell of.", "15m", {"instance": "a:1"}),
    Case("SluiceWorkersChange", {'sluice_worker_assignments_total{event="lost"}': "0+1x16 16x30"}, "16m",
         "15 partitions were lost to other workers within 15 minutes.", "40m"),
    Case("SluiceLostRecords", {'sluice_ledger_lost_records{where="log"}': "5 5 8x1600"}, "4m",
         "3 records were lost within a day (log).", "1500m", {"where": "log"}),
    Case("SluiceLogLost", {"sluice_landing_lost_records_total": "0 0 60x100"}, "4m",
         "60 records were gone before they had landed.", "90m"),
    Case("SluiceLogLost", {"sluice_landing_lost_records_total": "0x100",
                           "sluice_landing_spool_lost_records_total": "0 0 60x100"}, "4m",
         "60 records were gone before they had landed.", "90m"),
    Case("SluiceBooksDiffer", {"sluice_ledger_unaccounted_readings": "0 -7x5 0x10"}, "4m",
         "7 readings of the last day are neither stored nor anywhere else.", "10m"),
    Case("SluiceRefusals",
         {'sluice_ingest_readings_total{outcome="refused", reason="unknown_unit"}': "0+100x60 6000x20",
          'sluice_ingest_readings_total{outcome="accepted", reason=""}': "0+100x90"}, "55m",
         "5.5k readings were refused as unknown_unit within the hour, and more than 5 % still are.", "70m",
         {"reason": "unknown_unit"}),
    Case("SluiceQuarantineBehindTheLog",
         {'sluice_landing_rows_total{path="none", outcome="quarantined"}': "0+100x60 6000x120"}, "30m",
         "3k readings that had been accepted were quarantined within the hour.", "130m"),
    Case("SluiceQuarantineGrowing", {"sluice_quarantine_held_rows": "0+100x400 40000x400"}, "360m",
         "36k more readings are held than six hours ago.", "780m"),
    Case("SluiceQuarantineExpiring", {"sluice_quarantine_expired_total": "0 0 60x100"}, "4m",
         "60 readings went within the hour because it is too full or they were too old.", "90m"),
    Case("SluiceConflicts",
         {'sluice_landing_rows_total{path="suspect", outcome="conflict"}': "0+10x60 600x30",
          'sluice_landing_rows_total{path="fresh", outcome="stored"}': "0+100x90"}, "50m",
         "500 readings within the hour differ from what is stored at their time.", "75m"),
    Case("SluiceRejectedRecords", {"sluice_landing_rejected_records_total": "0 0 60x100"}, "4m",
         "60 records were quarantined whole within the hour.", "90m"),
    Case("SluiceUndecodableRecords", {"sluice_landing_undecodable_total": "0 0 60x100"}, "4m",
         "60 records were quarantined whole within the hour; twenty stop the worker.", "90m"),
    Case("SluiceApiErrorsFast", errors("api", "0+10x60 600x400"), "60m",
         "9.091% of the requests get a 5xx: a month's worth of errors (0.1 %) within days.", "420m"),
    Case("SluiceApiErrorsSlow", errors("api", "0+1x1500 1500x1500"), "1450m",
         "0.9901% of the requests of the last two hours got a 5xx, and of the day no fewer than 0.3 %;"
         " 0.1 % is the aim.", "2000m"),
    Case("SluiceApiSlow",
         buckets("sluice_api_request_seconds", "0+60x60", "0x20 0+60x40", 'route="/x", '), "18m",
         "One request in a hundred to /x takes 1m 39s or longer.", "60m", {"route": "/x"}),
    Case("SluiceApiBusy", {"sluice_api_requests_in_flight": "150x10 3x10"}, "8m",
         "150 requests are being answered at once.", "15m"),
]  # fmt: skip


def promtool_test(case: Case) -> dict[str, object]:
    rule = alerts()[case.alert]
    told = {**rule["annotations"], "description": case.description}
    firing = {"exp_labels": rule["labels"] | case.labels, "exp_annotations": told}
    return {
        "name": case.alert,
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [
            {"eval_time": case.fires_at, "alertname": case.alert, "exp_alerts": [firing]},
            {"eval_time": case.clears_at, "alertname": case.alert, "exp_alerts": []},
        ],
    }


def test_configuration_and_rules_are_valid() -> None:
    done = promtool("check", "config", "--lint=all", "--lint-fatal", str(CONFIG))
    assert done.returncode == 0, done.stdout + done.stderr
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", *map(str, RULES))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_fires_and_clears(case: Case, tmp_path: Path) -> None:
    content = {
        "rule_files": [str(path) for path in RULES],
        "evaluation_interval": "1m",
        "tests": [promtool_test(case)],
    }
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump(content))
    done = promtool("test", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    assert {case.alert for case in CASES} == set(alerts())


def test_every_alert_says_how_bad_what_and_where_to_read_on() -> None:
    page = (DIRECTORY / "runbooks.md").read_text()
    anchors = [heading.lower() for heading in re.findall(r"^### (\w+)$", page, re.MULTILINE)]
    assert len(anchors) == len(set(anchors)) == len(alerts()), "one section for each alert, and no other"
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        told = rule["annotations"]
        assert told.keys() == {"summary", "description", "runbook_url"}
        assert "$value" in told["description"], name
        place, _, anchor = told["runbook_url"].partition("#")
        assert CHECKOUT / place == DIRECTORY / "runbooks.md"
        assert anchor == name.lower()
        assert anchor in anchors, name


def test_every_metric_in_a_rule_is_one_that_a_role_or_a_recording_has() -> None:
    assert {name for rule in rules() for name in unknown_metrics(rule["expr"])} == set()
    assert unknown_metrics("rate(sluice_nothing_total[5m]) > sluice:nothing:sum") == {
        "sluice_nothing_total",
        "sluice:nothing:sum",
    }
