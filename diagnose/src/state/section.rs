//! A part of a report that is known, or the reason why it is not. Never silently missing.

use std::error::Error;

use serde::Serialize;

/// A part of a report: in JSON an object with the one key `known` or `unknown`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Section<T> {
    /// What it is.
    Known(T),
    /// Why it is not known.
    Unknown(String),
}

impl<T> Section<T> {
    /// Not known because of an error, whose causes are told, too.
    pub fn unknown(error: &dyn Error) -> Self {
        let mut said = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            said.push_str(": ");
            said.push_str(&cause.to_string());
            source = cause.source();
        }
        Self::Unknown(said)
    }

    /// What is known.
    #[must_use]
    pub fn known(&self) -> Option<&T> {
        match self {
            Self::Known(value) => Some(value),
            Self::Unknown(_) => None,
        }
    }
}

impl<T> From<Result<T, crate::Error>> for Section<T> {
    fn from(result: Result<T, crate::Error>) -> Self {
        result.map_or_else(|error| Self::unknown(&error), Self::Known)
    }
}

#[cfg(test)]
mod tests {
    use guest::{GuestPhys, GuestVirt, MemoryError};

    use super::*;

    #[test]
    fn an_error_is_told_with_its_cause() {
        let source = MemoryError::NotCaptured { at: GuestPhys(0x1000) };
        let error = crate::Error::Guest { what: "task list", at: GuestVirt(0x10), source };
        let section: Section<u32> = Err(error).into();
        let Section::Unknown(said) = &section else { panic!("known") };
        assert!(said.contains("task list") && said.contains("was not captured"), "{said}");
        let json = serde_json::to_string(&Section::Known(7)).unwrap();
        assert_eq!(json, r#"{"known":7}"#);
        assert!(serde_json::to_string(&section).unwrap().starts_with(r#"{"unknown":"#));
    }
}
