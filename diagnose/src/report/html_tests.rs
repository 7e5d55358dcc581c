//! Tests of the incident page: well-formed whatever the guest says, and complete.

use std::time::Duration;

use guest::{GuestPhys, GuestVirt, Reg};
use proptest::prelude::*;

use super::super::page::{InstructionLine, Moment};
use super::*;
use crate::testing::{diagnosis, frame};

const INJECTION: &str =
    "\"'></title></style></pre><script>alert(1)</script><img src=x onerror=alert(1)>\u{1b}";

/// A page with something in every section, all guest text from `said`.
fn page<'a>(diagnosis: &'a Diagnosis, said: &str) -> Page<'a> {
    let pairs = vec![("name".to_owned(), said.to_owned()), (said.to_owned(), "value".to_owned())];
    let moment = |micros, label: &str, standing| Moment {
        at: Duration::from_micros(micros),
        label: label.to_owned(),
        standing,
    };
    Page {
        diagnosis: Some(diagnosis),
        summary: format!("write() of {said} failed with EIO; the guest runs on."),
        facts: pairs.clone(),
        timeline: vec![
            moment(180, "registers", true),
            moment(610, "diagnosed", true),
            moment(790, said, true),
            moment(1_240, "resumed", true),
            moment(2_900, "probation", false),
        ],
        sources: vec![Source {
            frame: 1,
            file: said.to_owned(),
            first: 39,
            at: 40,
            lines: vec![said.to_owned(), "\treturn *s->p;".to_owned(), "}".to_owned()],
        }],
        disassembly: vec![
            InstructionLine {
                at: GuestVirt(0xffff_ffff_c000_0010),
                bytes: vec![0x48, 0x8b, 0x06],
                text: "mov rax, qword ptr [rsi]".to_owned(),
                faulted: true,
            },
            InstructionLine {
                at: GuestVirt(0xffff_ffff_c000_0013),
                bytes: vec![0xc3],
                text: said.to_owned(),
                faulted: false,
            },
        ],
        plan: vec![Step {
            what: format!("call mutex_unlock({said})"),
            why: "bw holds it".to_owned(),
            preconditions: vec![format!("owner of {said} is the current task")],
            done: Some(true),
        }],
        refusals: pairs.clone(),
        writes: vec![Write {
            at: Some(GuestVirt(0xffff_c900_0000_1050)),
            phys: GuestPhys(0x5050),
            old: vec![0; 8],
            new: (-5_i64).to_le_bytes().to_vec(),
            what: said.to_owned(),
            when: Some(Duration::from_micros(800)),
        }],
        texts: pairs,
        ..Page::new("title", Verdict::Repaired)
    }
}

/// The diagnosis, guest text from `said`.
fn said_by_guest(said: &str) -> Diagnosis {
    let mut diagnosis = diagnosis();
    diagnosis.title = format!("BUG: kernel NULL pointer dereference in bw [{said}]");
    diagnosis.evidence.push(said.to_owned());
    diagnosis.message = Some(said.to_owned());
    diagnosis.task.iter_mut().for_each(|task| said.clone_into(&mut task.comm));
    for frame in &mut diagnosis.frames {
        frame.module = Some(said.to_owned());
        frame.registers.set(Reg::Rax, 1);
    }
    diagnosis
}

/// Tags and texts of a page; an error where it is not well-formed. Knows the elements that the page uses and
/// no others, so that an element that slips in is an error.
fn check(page: &str) -> Result<String, String> {
    const VOID: [&str; 3] = ["meta", "br", "rect"];
    // Their end tags may be left out (HTML 13.1.2.4).
    const OPTIONAL: [&str; 3] = ["td", "th", "tr"];
    const KNOWN: [&str; 29] = [
        "html", "head", "meta", "title", "style", "body", "main", "span", "h1", "h2", "p", "dl",
        "dt", "dd", "svg", "text", "rect", "ul", "ol", "li", "div", "table", "thead", "tr", "th",
        "td", "pre", "br", "code",
    ];
    const ALSO: [&str; 4] = ["details", "summary", "del", "ins"];
    let (mut open, mut text) = (Vec::new(), String::new());
    let mut rest = page.strip_prefix("<!DOCTYPE html>").ok_or("no doctype")?;
    while let Some((before, after)) = rest.split_once('<') {
        if before.contains('>') && open.last() != Some(&"style") {
            return Err(format!("bare > in {before:?}"));
        }
        text += before;
        let (tag, after) = after.split_once('>').ok_or("unclosed tag")?;
        rest = after;
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap_or_default();
        if !KNOWN.contains(&name) && !ALSO.contains(&name) {
            return Err(format!("element {tag:?}"));
        }
        if tag.contains("on") && tag.contains("=") && tag.split(' ').any(|it| it.starts_with("on"))
        {
            return Err(format!("handler in {tag:?}"));
        }
        if VOID.contains(&name) {
            continue;
        }
        if !tag.starts_with('/') {
            open.push(name);
            continue;
        }
        while open.last().is_some_and(|last| *last != name && OPTIONAL.contains(last)) {
            open.pop();
        }
        if open.pop() != Some(name) {
            return Err(format!("{tag:?} does not match"));
        }
    }
    if open.is_empty() { Ok(text) } else { Err(format!("open: {open:?}")) }
}

#[test]
fn a_page_shows_everything_it_is_given() {
    let diagnosis = said_by_guest("crashcases");
    let page = html(&page(&diagnosis, "big_lock"));
    let text = check(&page).unwrap();
    for expected in [
        "repaired",
        "NULL pointer dereference in bw [crashcases]",
        "deref",
        "crashcases.c:77",
        "vfs_write",
        "mov rax, qword ptr [rsi]",
        "return *s-&gt;p;",
        "mutex",
        "fb ff ff ff ff ff ff ff",
        "owner of big_lock",
        "1.24 ms",
        "0xffffc90000001050",
    ] {
        assert!(text.contains(expected), "{expected:?} is missing");
    }
    if let Some(path) = std::env::var_os("DEFIB_PAGE") {
        std::fs::write(path, page).unwrap();
    }
}

#[test]
fn a_script_in_a_name_is_text() {
    let diagnosis = said_by_guest(INJECTION);
    let page = html(&page(&diagnosis, INJECTION));
    check(&page).unwrap();
    assert!(!page.contains("<script") && !page.contains("<img") && !page.contains('\u{1b}'));
    assert_eq!(page.matches("</style>").count(), 1);
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
}

#[test]
fn nothing_is_fetched() {
    let diagnosis = diagnosis();
    let page = html(&page(&diagnosis, "x"));
    for reference in ["http:", "https:", "src=", "href=", "url(", "@import", "<link", "<script"] {
        assert!(!page.contains(reference), "{reference}");
    }
}

#[test]
fn a_page_without_a_diagnosis() {
    let page = html(&Page::new("Guest died", Verdict::LetGo));
    let text = check(&page).unwrap();
    assert!(text.contains("Guest died") && text.contains("not repaired"));
    assert!(!text.contains("Cause"));
}

#[test]
fn a_huge_incident_stays_a_page() {
    let mut diagnosis = said_by_guest("m");
    diagnosis.frames.extend((0..10_000).map(|_| frame(&"f".repeat(5_000), Some("m"))));
    let mut page = page(&diagnosis, "m");
    page.texts.push(("log".to_owned(), "x".repeat(1 << 20)));
    let html = html(&page);
    check(&html).unwrap();
    assert!(html.len() < 2 << 20, "{}", html.len());
}

proptest! {
    #[test]
    fn any_text_leaves_the_page_well_formed(said in any::<String>()) {
        let diagnosis = said_by_guest(&said);
        let page = html(&page(&diagnosis, &said));
        prop_assert!(check(&page).is_ok(), "{:?}", check(&page));
    }
}
