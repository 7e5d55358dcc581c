//! Layouts of the structures that variables of one object lead to: which member lies at an offset. The kernel's own types
//! are in `btf.rs`, collecting layouts from debug information is in `compile/layouts.rs`.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;

use crate::TypeShape;

/// Deepest nesting of structures by value that is followed.
pub(crate) const MAX_DEPTH: usize = 32;

/// Members of a structure or union, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) members: Vec<LayoutMember>,
}

/// One member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayoutMember {
    /// Empty for an anonymous structure or union.
    pub(crate) name: String,
    /// Bytes from the start of the structure around it.
    pub(crate) offset: u64,
    /// Bytes of the member, of an array those of one element.
    pub(crate) size: u64,
    /// Number of elements; `None` = no array.
    pub(crate) count: Option<u64>,
    /// Type of the member, of an array that of its elements.
    pub(crate) shape: TypeShape,
    /// What the member has inside, if it is a structure or union.
    pub(crate) inner: Option<Arc<Layout>>,
}

/// Layouts by the name that [`TypeShape`] gives; `None` for what is no structure, or not always the same.
pub(crate) type Layouts = HashMap<String, Option<Arc<Layout>>>;

impl LayoutMember {
    /// Offset of a byte of the structure within this member.
    fn inside(&self, offset: u64) -> Option<u64> {
        let inside = offset.checked_sub(self.offset)?;
        (inside < self.size.saturating_mul(self.count.unwrap_or(1))).then_some(inside)
    }
}

impl Layout {
    /// Path and type of the innermost member at an offset in bytes. Where several members share the byte (unions,
    /// bit-fields), the member around them is as far as the path goes.
    pub(crate) fn member_at(&self, offset: u64) -> Option<(String, TypeShape)> {
        let mut path = String::new();
        let mut found: Option<(usize, &TypeShape)> = None;
        let (mut layout, mut offset) = (self, offset);
        for _ in 0..MAX_DEPTH {
            let mut sharing =
                layout.members.iter().filter(|member| member.inside(offset).is_some());
            let (Some(member), None) = (sharing.next(), sharing.next()) else { break };
            let mut inside = member.inside(offset)?;
            if !member.name.is_empty() {
                path.push_str(if path.is_empty() { "" } else { "." });
                path.push_str(&member.name);
            }
            if member.count.is_some() {
                // Writing to a String cannot fail.
                let _ = write!(path, "[{}]", inside.checked_div(member.size)?);
                inside = inside.checked_rem(member.size)?;
            }
            if !member.name.is_empty() {
                found = Some((path.len(), &member.shape));
            }
            let Some(inner) = &member.inner else { break };
            (layout, offset) = (inner, inside);
        }
        let (len, shape) = found?;
        path.truncate(len);
        Some((path, shape.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, offset: u64, size: u64, inner: Option<Layout>) -> LayoutMember {
        let (shape, inner) = (TypeShape::Other, inner.map(Arc::new));
        LayoutMember { name: name.to_owned(), offset, size, count: None, shape, inner }
    }

    #[test]
    fn paths_stop_where_members_share_bytes() {
        let pair = Layout { members: vec![member("a", 0, 4, None), member("b", 4, 4, None)] };
        let word = member("word", 0, 4, None);
        let union = Layout { members: vec![word, member("", 0, 8, Some(pair.clone()))] };
        let array = LayoutMember { count: Some(3), ..member("list", 16, 8, Some(pair)) };
        let bits = [member("x", 48, 1, None), member("y", 48, 1, None)];
        let members = vec![
            member("id", 0, 8, None),
            member("u", 8, 8, Some(union.clone())),
            array,
            member("", 40, 8, Some(union)),
        ];
        let layout = Layout { members: members.into_iter().chain(bits).collect() };
        let at = |offset| layout.member_at(offset).map(|(path, _)| path);
        assert_eq!(at(7).as_deref(), Some("id"));
        assert_eq!(at(8).as_deref(), Some("u"));
        assert_eq!(at(12).as_deref(), Some("u.b"));
        assert_eq!(at(36).as_deref(), Some("list[2].b"));
        assert_eq!(at(40), None);
        assert_eq!(at(44).as_deref(), Some("b"));
        assert_eq!(at(48), None);
        assert_eq!(at(49), None);
    }
}
