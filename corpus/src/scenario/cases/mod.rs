//! The tables of cases, one a driver.

mod callback;
mod chardev;
mod core;
mod irq;
mod locks;
mod timer;
mod work;

use super::Case;

/// All tables.
const TABLES: &[&[Case]] = &[
    chardev::CASES,
    locks::CASES,
    timer::CASES,
    irq::CASES,
    work::CASES,
    callback::CASES,
    core::CASES,
];

/// All cases of the corpus.
pub fn cases() -> impl Iterator<Item = &'static Case> {
    TABLES.iter().copied().flatten()
}

/// The case of a name.
pub fn case(name: &str) -> Option<&'static Case> {
    cases().find(|case| case.name == name)
}
