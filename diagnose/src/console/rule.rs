//! What a kind of report is: by which words a line begins one, how its title is made, and the common shapes of
//! rules. The kinds there are stand in `heads.rs`.

use memchr::memmem;

use super::skip::Name;
use crate::CrashClass;

/// Where the function of a title stands.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// The title has none.
    Nowhere,
    /// In the line of the instruction pointer.
    Pointer,
    /// There, else in the call trace.
    PointerThenTrace,
    /// In the call trace.
    Trace,
    /// In the line of the instruction pointer and the frames right after it, else in the call trace: a
    /// warning traps since v4.12 and printed its call trace only before.
    Warning,
    /// In the stack that follows a line with these words, up to the next stack.
    After(&'static [&'static str]),
    /// After these words in the head, else in the call trace.
    Named(&'static str),
    /// After these words in the head, else in the frames that follow.
    NamedThenFrames(&'static str),
    /// In the frames that follow the head.
    Frames,
    /// After ` at: ` in the line that follows one with these words (lockdep); the fallback are further
    /// ` at: ` and the call trace.
    Lock(&'static [&'static str]),
    /// Like it, but only that one line: it has to be there.
    OnlyLock(&'static [&'static str]),
    /// In the first line that is an address and a function, else in the call trace.
    FirstAddress,
    /// Where the function's own words are: after `last function: `.
    LastFunction,
    /// In the stack that the timer interrupt broke into.
    Interrupted,
    /// The words after `corrupted in: `.
    CorruptedIn,
}

/// Which of the frames is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pick {
    /// The first that is not passed over.
    First,
    /// The entry into the code that loops: what comes before a dispatcher.
    Stall,
    /// What a sleeping task waits in.
    Hang,
}

/// What of the head goes into the title as `{1}`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Word {
    /// Nothing.
    None,
    /// The rest of the line after these words.
    RestAfter(&'static str),
    /// Up to the second words, after the first.
    Between(&'static str, &'static str),
    /// Whichever of these stands in the line first.
    OneOf(&'static [&'static str]),
    /// KASAN's kind and `Read` or `Write`, which stands in a later line.
    Access,
}

/// One kind of report.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    /// Words that must follow each other in the line.
    pub(crate) words: &'static [&'static str],
    /// The title, `{f}` for the function, `{1}` for the word.
    pub(crate) title: &'static str,
    pub(crate) word: Word,
    pub(crate) place: Place,
    /// Names passed over besides those of [`super::skip::FUNCTIONS`].
    pub(crate) skip: &'static [Name],
    pub(crate) pick: Pick,
    /// Whether it comes with a stack, so that one without is damaged.
    pub(crate) stack: bool,
    /// It follows a report, so a log where it comes first has lost that.
    pub(crate) lost_head: bool,
    /// Its class, where the head alone tells.
    pub(crate) class: fn() -> Option<CrashClass>,
}

/// Reports that begin with the same words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    /// The words.
    pub(crate) words: &'static str,
    pub(crate) rules: &'static [Rule],
    /// Lines with these words in order are none.
    pub(crate) not: &'static [&'static [&'static str]],
    /// It goes on with a report that has begun.
    pub(crate) goes_on: bool,
    /// User space and drivers print it, too: without a rule that fits it is a report only with a call trace.
    pub(crate) common: bool,
}

impl Head {
    /// The rule for a line that has the words.
    pub(crate) fn rule(&self, text: &[u8]) -> Option<&'static Rule> {
        self.rules.iter().find(|rule| in_order(text, rule.words))
    }
}

/// Whether the words stand in the text one after the other.
pub(crate) fn in_order(text: &[u8], words: &[&str]) -> bool {
    let mut rest = text;
    words.iter().all(|word| match memmem::find(rest, word.as_bytes()) {
        Some(at) => {
            rest = rest.get(at + word.len()..).unwrap_or_default();
            true
        }
        None => false,
    })
}

/// A rule with a stack in the trace and nothing special: the base of the table's rows.
pub(super) const BASE: Rule = Rule {
    words: &[],
    title: "",
    word: Word::None,
    place: Place::Trace,
    skip: &[],
    pick: Pick::First,
    stack: true,
    lost_head: false,
    class: unknown,
};

pub(super) fn unknown() -> Option<CrashClass> {
    None
}

/// A title without a function and without a stack.
pub(super) const fn bare(words: &'static [&'static str], title: &'static str) -> Rule {
    Rule { words, title, place: Place::Nowhere, stack: false, ..BASE }
}

/// A damaged head.
pub(super) const fn lost(words: &'static [&'static str], title: &'static str) -> Rule {
    Rule { words, title, place: Place::Nowhere, lost_head: true, ..BASE }
}

pub(super) const fn fault(
    words: &'static [&'static str],
    title: &'static str,
    class: fn() -> Option<CrashClass>,
) -> Rule {
    Rule { words, title, place: Place::PointerThenTrace, class, ..BASE }
}

pub(super) const fn trace(
    words: &'static [&'static str],
    title: &'static str,
    skip: &'static [Name],
) -> Rule {
    Rule { words, title, skip, ..BASE }
}

pub(super) const fn warning(
    words: &'static [&'static str],
    title: &'static str,
    skip: &'static [Name],
) -> Rule {
    Rule { words, title, skip, place: Place::Warning, ..BASE }
}

pub(super) const fn lock(
    words: &'static [&'static str],
    title: &'static str,
    after: &'static [&'static str],
) -> Rule {
    Rule { words, title, place: Place::OnlyLock(after), ..BASE }
}

/// A fault whose function is where the instruction pointer is.
pub(super) const fn pointer(
    words: &'static [&'static str],
    title: &'static str,
    class: fn() -> Option<CrashClass>,
) -> Rule {
    Rule { words, title, place: Place::Pointer, class, ..BASE }
}
