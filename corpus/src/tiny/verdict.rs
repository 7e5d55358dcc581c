//! What a guard says of a tiny guest's crash, compared with what the case expects. How the guest ends is for the
//! caller: that depends on the machine it runs on.

use serde_json::Value;

use super::{Case, MODULE};
use crate::Result;
use crate::campaign::names;

impl Case {
    /// What `diagnosis` and `repaired` (the guard's events, or their fields) say otherwise than expected.
    ///
    /// # Errors
    /// As [`Case::line`].
    pub fn differences(&self, diagnosis: &Value, repaired: &Value) -> Result<Vec<String>> {
        let text = |pointer: &str| names::text(diagnosis, pointer);
        let file = text("/offender/source/file");
        let line = diagnosis.pointer("/offender/source/line").and_then(Value::as_u64).unwrap_or(0);
        let place = format!("{}:{line}", file.rsplit('/').next().unwrap_or_default());
        let held = names::held(diagnosis, "/boundary/effects/held");
        let rung = repaired.get("rung").and_then(Value::as_u64).unwrap_or(0);
        let compared = [
            ("class", text("/class/kind"), names::class(self.class).to_owned()),
            ("context", text("/context/kind"), names::context(self.context).to_owned()),
            ("offender", text("/offender/module"), MODULE.to_owned()),
            ("function", text("/offender/function"), self.function.to_owned()),
            ("place", place, format!("driver.c:{}", self.line()?)),
            ("boundary", text("/boundary/function"), self.boundary.to_owned()),
            ("held", held, names::resources(self.held)),
            ("rung", rung.to_string(), names::rung(self.rung).to_string()),
        ];
        let differ = compared.into_iter().filter(|(_, found, expected)| found != expected);
        let told = |(what, found, expected)| format!("{what}: {found:?} instead of {expected:?}");
        Ok(differ.map(told).collect())
    }

    /// What the guest's serial text must hold after the repair, and does not.
    #[must_use]
    pub fn missing(&self, serial: &str) -> Vec<String> {
        let returned = format!("case {}: write returned {}", self.name, self.write_returns);
        let lines = [returned, "checksum ok".to_owned()];
        lines.into_iter().filter(|line| !serial.contains(line.as_str())).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::tiny::CASES;

    #[test]
    fn each_thing_told_otherwise_is_a_difference() {
        let case = &CASES[0];
        let right = json!({
            "class": { "kind": "null_dereference" }, "context": { "kind": "task" },
            "offender": { "module": "tiny_driver", "function": "null_mutex",
                          "source": { "file": "/tiny-guest/driver.c", "line": case.line().unwrap() } },
            "boundary": { "function": "vfs_write", "effects": { "held": [{ "kind": "mutex" }] } },
        });
        let end = json!({ "rung": 1 });
        assert_eq!(case.differences(&right, &end).unwrap(), Vec::<String>::new());
        assert_eq!(case.differences(&json!({}), &json!({})).unwrap().len(), 8);
        let serial = "case null-mutex: write returned -5\nchecksum BAD\n";
        assert_eq!(case.missing(serial), ["checksum ok"]);
    }
}
