//! `defib plan`: what would be done about the crash in a dump, and why not more. Writes nothing.

use std::io::Write;

use anyhow::{Context, Result, bail};
use diagnose::vmcore::Vmcore;
use repair_image::MappedFile;
use serde_json::json;

use crate::Outcome;
use crate::cli::{Format, PlanArguments};
use crate::offline::of_dump;
use crate::{guard_command, knowledge};

/// Runs `defib plan`.
///
/// # Errors
/// When the dump or the kernel in it can't be read, or no crash is in it.
pub fn run(arguments: &PlanArguments) -> Result<Outcome> {
    let dump = &arguments.dump;
    let bytes = MappedFile::open(dump).with_context(|| format!("cannot use {}", dump.display()))?;
    let mut core =
        Vmcore::parse(bytes).with_context(|| format!("cannot use {}", dump.display()))?;
    let policy = guard_command::policy(arguments.policy.as_deref())?;
    let Some(crash) = of_dump(&mut core, &knowledge::sources(&arguments.knowledge), &policy)?
    else {
        bail!("no vCPU of this dump is crashing: none has the kernel's crash code on its stack")
    };
    let (diagnosis, plan) = (&crash.diagnosis, &crash.plan);
    let text = match arguments.format {
        Format::Text => {
            let remarks = crash.remarks.iter().map(|remark| format!("remark: {remark}\n"));
            let remarks: String = remarks.collect();
            format!("{}\n{plan}{remarks}", diagnose::report::text(diagnosis))
        }
        Format::Json => {
            json!({ "diagnosis": diagnosis, "plan": plan, "remarks": crash.remarks }).to_string()
        }
    };
    writeln!(std::io::stdout(), "{text}")?;
    Ok(if plan.rung.is_some() { Outcome::Done } else { Outcome::NotSaved })
}
