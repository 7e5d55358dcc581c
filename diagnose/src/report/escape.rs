//! Text inside HTML. Everything that a page shows passes here: names, messages and memory of a guest are
//! written by whoever owns the guest.

use std::fmt::{self, Write};

/// HTML under construction. Only literals get into it unescaped.
#[derive(Default)]
pub(super) struct Html(String);

impl Html {
    /// Markup of this program.
    pub(super) fn raw(&mut self, markup: &'static str) -> &mut Self {
        self.0.push_str(markup);
        self
    }

    /// Text, whoever wrote it; in an element or a quoted attribute.
    pub(super) fn text(&mut self, text: impl fmt::Display) -> &mut Self {
        // Writing to a string can't fail.
        let _ = write!(Escaped(&mut self.0), "{text}");
        self
    }

    /// An element without attributes around text.
    pub(super) fn element(&mut self, tag: &'static str, text: impl fmt::Display) -> &mut Self {
        self.raw("<").raw(tag).raw(">").text(text).raw("</").raw(tag).raw(">")
    }

    pub(super) fn finish(self) -> String {
        self.0
    }
}

struct Escaped<'a>(&'a mut String);

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            match c {
                '&' => self.0.push_str("&amp;"),
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                '"' => self.0.push_str("&quot;"),
                '\'' => self.0.push_str("&#39;"),
                '\n' | '\t' => self.0.push(c),
                // Control characters are not allowed in HTML; marks that turn the direction of writing
                // could make one name look like another.
                c if c.is_control() => self.0.push('\u{fffd}'),
                '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                    self.0.push('\u{fffd}');
                }
                c => self.0.push(c),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_of_a_guest_is_text() {
        let mut html = Html::default();
        html.element("b", "<i a='b' c=\"d\">&\u{1b}[2J\u{202e}");
        assert_eq!(
            html.finish(),
            "<b>&lt;i a=&#39;b&#39; c=&quot;d&quot;&gt;&amp;\u{fffd}[2J\u{fffd}</b>"
        );
    }
}
