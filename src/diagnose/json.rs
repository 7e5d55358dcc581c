//! A finding as JSON for scripts: docs/diagnose.md. Concludes nothing.

use anyhow::Result;
use serde_json::{Value, json};

use super::Finding;
use super::dump::OfDump;
use super::log::OfLog;
use super::text::{NO_CRASH, ONLY_A_LOG};

/// Raised when a field changes its meaning.
const SCHEMA: u32 = 1;

pub fn json(finding: &Finding) -> Result<String> {
    let value = match finding {
        Finding::Dump(dump) => of_dump(dump)?,
        Finding::Log(log) => of_log(log),
    };
    Ok(format!("{value:#}\n"))
}

fn of_dump(dump: &OfDump) -> Result<Value> {
    let (ram, captured) = dump.coverage;
    let kernel = &dump.kernel;
    let (diagnosis, plan) = match &dump.crash {
        Some(crash) => {
            (serde_json::to_value(&crash.diagnosis)?, serde_json::to_value(&crash.plan)?)
        }
        None => (Value::Null, Value::Null),
    };
    Ok(json!({
        "schema": SCHEMA,
        "input": {
            "kind": "dump", "path": dump.name, "format": dump.format,
            "ram_bytes": ram, "captured_bytes": captured, "remarks": dump.remarks,
        },
        "kernel": {
            "release": kernel.release, "build_id": kernel.build_id, "knowledge": kernel.knowledge,
        },
        "note": dump.crash.is_none().then_some(NO_CRASH),
        "diagnosis": diagnosis,
        "plan": plan,
        "state": serde_json::to_value(&dump.state)?,
        "reports": dump.reports,
    }))
}

fn of_log(log: &OfLog) -> Value {
    json!({
        "schema": SCHEMA,
        "input": { "kind": "log", "path": log.name },
        "note": ONLY_A_LOG,
        "cause": log.cause(),
        "reports": log.reports,
    })
}
