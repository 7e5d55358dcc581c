//! Every kind of report, by the words with which one begins; the titles are those that kernel fuzzing
//! dashboards print (syzkaller, pkg/report). Not where in a log reports begin and end.

use super::bug_rules::{BUG, NULL, PAGING};
use super::rule::{Head, Pick, Rule, Word, bare, fault, pointer, trace, unknown};
use super::skip::Name;
use super::skip::Name::{Has, Starts};
use super::warning_rules::{INFO, PANIC, WARNING};
use crate::CrashClass;

const OVERFLOW: &[Name] = &[Has("ubsan"), Has("overflow")];

/// Every head. Where a line has several, the first of the table counts.
pub(crate) const HEADS: &[Head] = &[
    Head { not: &[&["DEBUG:"], &["xlog_status:"]], ..head("BUG:", BUG) },
    Head {
        not: &[
            &["WARNING: /etc/ssh/moduli does not exist"],
            &["WARNING: workqueue cpumask: online intersect"],
            &["WARNING: ", "he mand mount option"],
            &["WARNING: Unprivileged eBPF is enabled"],
            &["WARNING: fbcon: Driver "],
            &["WARNING: See http", "for mitigation options"],
            &["WARNING: kernel not compiled with CPU_SRSO"],
            &["EXT4-fs"],
            &["EXT4-FS"],
            &["XFS (", "): WARNING"],
            &["uses deprecated v2 capabilities"],
            &["uses wireless extensions"],
        ],
        common: true,
        ..head("WARNING:", WARNING)
    },
    Head {
        not: &[
            &["INFO: lockdep is turned off"],
            &["INFO: Stall ended before state dump start"],
            &["INFO: NMI handler"],
            &["INFO: recovery required on readonly filesystem"],
            &["took too long"],
            &["is not present in /proc/kallsyms"],
            &["_INFO:"],
        ],
        common: true,
        ..head("INFO:", INFO)
    },
    head(
        "Unable to handle kernel",
        &[
            fault(&["Unable to handle kernel paging request"], PAGING, || {
                Some(CrashClass::WildPointer)
            }),
            fault(&["Unable to handle kernel NULL pointer dereference"], NULL, || {
                Some(CrashClass::NullDereference)
            }),
            fault(
                &["Unable to handle kernel access to user memory"],
                "BUG: unable to handle kernel access to user memory in {f}",
                || Some(CrashClass::UserAccess),
            ),
        ],
    ),
    Head {
        // user space: `traps: a.out[1] general protection fault ip:1 sp:2 error:0 in a.out[3+4]`
        not: &[&["general protection fault", " error:", " in "]],
        ..head(
            "general protection fault",
            &[fault(&["general protection fault", ":"], "general protection fault in {f}", || {
                Some(CrashClass::GeneralProtection)
            })],
        )
    },
    head(
        "stack segment: ",
        &[fault(&["stack segment: "], "stack segment fault in {f}", || {
            Some(CrashClass::Other { reporter: "exc_stack_segment".to_owned() })
        })],
    ),
    Head { goes_on: true, ..head("Kernel panic", PANIC) },
    Head {
        goes_on: true,
        ..head(
            "PANIC: double fault",
            &[pointer(&["PANIC: double fault"], "PANIC: double fault in {f}", || {
                Some(CrashClass::DoubleFault)
            })],
        )
    },
    head(
        "kernel BUG",
        &[
            Rule {
                class: || Some(CrashClass::Usercopy),
                ..trace(
                    &["kernel BUG at mm/usercopy.c"],
                    "BUG: bad usercopy in {f}",
                    &[Has("usercopy"), Has("__check")],
                )
            },
            Rule {
                class: || Some(CrashClass::ListCorruption),
                ..trace(&["kernel BUG at lib/list_debug.c"], "BUG: corrupted list in {f}", &[])
            },
            Rule {
                skip: &[Starts("skb_")],
                ..fault(&["kernel BUG at "], "kernel BUG in {f}", || Some(CrashClass::Bug))
            },
        ],
    ),
    head(
        "Kernel BUG",
        &[Rule {
            word: Word::RestAfter("Kernel BUG "),
            stack: true,
            class: || Some(CrashClass::Bug),
            ..bare(&["Kernel BUG "], "kernel BUG {1}")
        }],
    ),
    head(
        "BUG kmalloc-",
        &[Rule {
            stack: true,
            ..bare(&["BUG kmalloc-", ": Object already free"], "BUG: Object already free")
        }],
    ),
    head(
        "divide error:",
        &[pointer(&["divide error:"], "divide error in {f}", || Some(CrashClass::Divide))],
    ),
    // v5.8 only: 9d06c4027f21 ("x86/entry: Convert Divide Error to IDTENTRY") misspelt it.
    head(
        "divide_error:",
        &[pointer(&["divide_error:"], "divide error in {f}", || Some(CrashClass::Divide))],
    ),
    Head {
        goes_on: true,
        ..head(
            "invalid opcode:",
            &[pointer(&["invalid opcode:"], "invalid opcode in {f}", || {
                Some(CrashClass::InvalidOpcode)
            })],
        )
    },
    head(
        "UBSAN:",
        &[
            // Before v5.10.
            trace(
                &["UBSAN: Undefined behaviour in"],
                "UBSAN: undefined-behaviour in {f}",
                OVERFLOW,
            ),
            Rule {
                word: Word::Between("UBSAN: ", " in"),
                ..trace(&["UBSAN: ", " in"], "UBSAN: {1} in {f}", OVERFLOW)
            },
        ],
    ),
    Head {
        goes_on: true,
        ..head(
            "unregister_netdevice: waiting for",
            &[bare(
                &["unregister_netdevice: waiting for ", " to become free"],
                "unregister_netdevice: waiting for DEV to become free",
            )],
        )
    },
    head(
        "VFS: Close: file count is 0",
        &[bare(&["VFS: Close"], "VFS: Close: file count is zero (use-after-free)")],
    ),
    head(
        "VFS: Busy inodes after unmount",
        &[bare(&["VFS: Busy"], "VFS: Busy inodes after unmount (use-after-free)")],
    ),
    Head {
        goes_on: true,
        ..head("Internal error:", &[fault(&["Internal error:"], "Internal error in {f}", unknown)])
    },
    head("Unhandled fault:", &[fault(&["Unhandled fault:"], "Unhandled fault in {f}", unknown)]),
    head("Alignment trap:", &[fault(&["Alignment trap:"], "Alignment trap in {f}", unknown)]),
    // The dashboards have no title for these.
    head(
        "hard LOCKUP",
        &[Rule {
            pick: Pick::Stall,
            ..fault(&["hard LOCKUP"], "hard lockup in {f}", || Some(CrashClass::HardLockup))
        }],
    ),
    Head {
        goes_on: true,
        ..head("Oops: ", &[Rule { lost_head: true, ..fault(&["Oops: "], "Oops in {f}", unknown) }])
    },
];

const fn head(words: &'static str, rules: &'static [Rule]) -> Head {
    Head { words, rules, not: &[], goes_on: false, common: false }
}
