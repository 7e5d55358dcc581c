//! The tables of cases, one a driver.

mod bind;
mod block;
mod callback;
mod chardev;
mod class;
mod core;
mod cpu;
mod deferred;
mod fops;
mod fs;
mod hang;
mod init;
mod irq;
mod load;
mod locks;
mod net;
mod proc;
mod text;
mod timer;
mod work;

use super::Case;

/// All tables.
const TABLES: &[&[Case]] = &[
    chardev::CASES,
    load::CASES,
    locks::CASES,
    timer::CASES,
    hang::CASES,
    irq::CASES,
    work::CASES,
    callback::CASES,
    proc::CASES,
    fops::CASES,
    deferred::CASES,
    net::CASES,
    init::CASES,
    bind::CASES,
    fs::CASES,
    core::CASES,
    class::CASES,
    text::CASES,
    block::CASES,
    cpu::CASES,
];

/// All cases of the corpus.
pub fn cases() -> impl Iterator<Item = &'static Case> {
    TABLES.iter().copied().flatten()
}

/// The case of a name.
pub fn case(name: &str) -> Option<&'static Case> {
    cases().find(|case| case.name == name)
}
