//! YAML text to a tree in which every value knows where it was written. The only module that names serde-saphyr.
//!
//! The tree is built from the events of serde-saphyr's parser rather than through serde, so that a document with ten
//! mistakes yields ten problems, and so that text stays text: `no`, `1.0` and `0644` are what was written, never
//! false, 1 and 420. Only the caller knows which type a value should have.

use super::host_policy::Position;
use super::problem::{Fault, PROBLEMS_PER_FILE, Problem, quote};
use foldhash::{HashMap, HashMapExt as _};
use serde_saphyr::granit_parser::{self, Event, Parser, ScalarStyle, Span};
use std::borrow::Cow;
use std::sync::Arc;

/// Bytes of one file. The largest policies people report are some megabytes.
pub const FILE_BYTES: usize = 10 << 20;
/// Bytes of all files together: what an agent with 256 MiB can read and still enforce.
pub const TOTAL_BYTES: usize = 64 << 20;
/// Nesting of one document; the language needs nine. Bounds the recursion of everything that walks the tree.
pub const DEPTH: usize = 64;
/// Values in one document: about 50 MiB of tree.
pub const NODES: usize = 1 << 19;
/// Bytes of one value. The longest that makes sense is a description.
pub const SCALAR_BYTES: usize = 64 << 10;
/// Documents of all files together.
pub const DOCUMENTS: usize = 65_536;
/// Values that anchors and aliases of one document may copy: enough to share lists, too few for a "billion laughs".
pub const COPIED_NODES: usize = 1 << 16;
/// Bytes that anchors and aliases of one document may copy.
pub const COPIED_BYTES: usize = 1 << 20;
/// Syntax errors after which a file is given up.
const SYNTAX_ERRORS: usize = 100;

/// A value and where it begins. What stands in the file as it is meant (nearly all of it) is not copied.
#[derive(Clone, Debug)]
pub struct Node<'t> {
    /// From 1.
    pub line: u32,
    /// From 1, in characters.
    pub column: u32,
    pub value: Value<'t>,
}

#[derive(Clone, Debug)]
pub enum Value<'t> {
    Text(Text<'t>),
    List(Vec<Node<'t>>),
    Map(Vec<(Node<'t>, Node<'t>)>),
    /// Nothing after the colon, `~` or `null`, unquoted.
    Nothing,
    /// Already reported; say no more about it.
    Broken,
}

#[derive(Clone, Debug)]
pub struct Text<'t> {
    pub text: Cow<'t, str>,
    /// Characters between the start of the node and the text, if the text stands in the file as it is (no escapes,
    /// one line): then a column inside the text is a column in the file.
    pub inset: Option<u32>,
}

/// A settings file, through serde: line, column, the keys that would have been right.
pub fn settings<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_saphyr::from_str(text).map_err(|error| error.to_string())
}

impl Node<'_> {
    pub fn at(&self, file: &Arc<str>) -> Position {
        Position { file: Arc::clone(file), line: self.line, column: self.column }
    }
}

/// The problem that a small language inside a text has, where it is in the file; at the start of the text, if the
/// text was written with escapes or over several lines.
pub fn inside(at: &Position, text: &Text<'_>, fault: Fault) -> Problem {
    let Fault { offset, what, why, help } = fault;
    let inset = text.inset.map_or(0, |inset| inset.saturating_add(u32::try_from(offset).unwrap_or(0)));
    let at = Position { column: at.column.saturating_add(inset), ..at.clone() };
    Problem { help, ..Problem::error(at, what, why) }
}

/// Reads one file and hands each document on as soon as it is read. Never panics, whatever the bytes.
pub fn read<'t>(
    file: &Arc<str>,
    text: &'t str,
    problems: &mut Vec<Problem>,
    mut each: impl FnMut(Node<'t>, &mut Vec<Problem>),
) {
    let at = |line: usize, column: usize| Position {
        file: Arc::clone(file),
        line: u32::try_from(line).unwrap_or(u32::MAX),
        column: u32::try_from(column).unwrap_or(u32::MAX),
    };
    if text.len() > FILE_BYTES {
        let what = format!("the file has {} bytes", text.len());
        problems.push(Problem::error(at(1, 1), what, format!("a file has at most {FILE_BYTES}")));
        return;
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    // The parser takes NUL for the end of the text, so everything behind it would silently not be in force.
    if let Some(offset) = text.find('\0') {
        let before = &text[..offset];
        let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        let line = before.matches('\n').count() + 1;
        problems.push(Problem::error(at(line, column), "the file has a NUL byte", "policies are text"));
        return;
    }
    let mut options = granit_parser::options! {
        disallow_directives: true,
        emit_unresolved_aliases: true,
        flow_nesting_limit: DEPTH,
        block_nesting_limit: DEPTH,
    };
    options.set_emit_comments(false);
    let mut parser = Parser::new_from_str_with_options(text, options);
    let first = problems.len();
    let mut syntax_errors = 0;
    let mut tree = Tree::new(text);
    loop {
        if problems.len() - first >= PROBLEMS_PER_FILE {
            break;
        }
        let fault = match parser.next_event() {
            None => break,
            Some(Ok((event, span))) => match tree.take(event, span, &mut |span: &Span, what: String, why: &str| {
                problems.push(Problem::error(at(span.start.line(), span.start.col() + 1), what, why));
            }) {
                Ok(None) => None,
                Ok(Some(root)) => {
                    each(root, problems);
                    None
                }
                Err(why) => {
                    // The search for the next document would read on through what is too large already.
                    let at = at(span.start.line(), span.start.col() + 1);
                    problems.push(Problem::error(at, "the document is too large; the file is not read further", why));
                    break;
                }
            },
            Some(Err(error)) => Some((*error.marker(), error.info())),
        };
        let Some((marker, why)) = fault else { continue };
        let tab = why.contains("tab").then(|| "indent with spaces: YAML takes no tabs there".to_owned());
        problems.push(Problem {
            help: tab,
            ..Problem::error(at(marker.line(), marker.col() + 1), "this is not YAML", why)
        });
        syntax_errors += 1;
        tree = Tree::new(text);
        if syntax_errors >= SYNTAX_ERRORS || !parser.proceed_next_document().unwrap_or(false) {
            break;
        }
    }
    if problems.len() - first >= PROBLEMS_PER_FILE {
        problems.truncate(first + PROBLEMS_PER_FILE);
        let why = format!("more than {PROBLEMS_PER_FILE} problems in one file");
        let last = problems.iter().skip(first).map(|p| p.at.line).max().unwrap_or(1);
        problems.push(Problem::error(at(last as usize, 1), "the other problems of this file are not shown", why));
    }
}

/// What a finished value costs to copy.
#[derive(Clone, Copy, Default)]
struct Size {
    nodes: usize,
    bytes: usize,
    depth: usize,
}

impl Size {
    fn add(&mut self, child: Self) {
        self.nodes += child.nodes;
        self.bytes += child.bytes;
        self.depth = self.depth.max(child.depth + 1);
    }
}

/// A list or map that is not finished.
struct Open<'t> {
    /// Still empty.
    node: Node<'t>,
    anchor: usize,
    size: Size,
    /// Where its values begin in `Tree::finished`.
    first: usize,
}

/// One document in the making.
struct Tree<'t> {
    text: &'t str,
    open: Vec<Open<'t>>,
    /// Values of the open lists and maps, the innermost last: keys and values of a map by turns. Each list gets its memory
    /// once, when its length is known.
    finished: Vec<Node<'t>>,
    root: Option<Node<'t>>,
    anchors: HashMap<usize, (Node<'t>, Size)>,
    nodes: usize,
    copied: Size,
}

type Refused = String;

impl<'t> Tree<'t> {
    fn new(text: &'t str) -> Self {
        Self {
            text,
            open: Vec::new(),
            finished: Vec::new(),
            root: None,
            anchors: HashMap::new(),
            nodes: 0,
            copied: Size::default(),
        }
    }

    /// `Ok(Some)` when a document is complete. `say` reports what is wrong without ending the document.
    fn take(
        &mut self,
        event: Event<'t>,
        span: Span,
        say: &mut dyn FnMut(&Span, String, &str),
    ) -> Result<Option<Node<'t>>, Refused> {
        let tagged = event.tag().filter(|t| !t.is_yaml_core_schema_tag("str")).map(ToString::to_string);
        if let Some(tag) = tagged {
            say(&span, format!("a value has the tag {}", quote(&tag)), "tags have no meaning in policies");
        }
        let node = |value| Node {
            line: u32::try_from(span.start.line()).unwrap_or(u32::MAX),
            column: u32::try_from(span.start.col() + 1).unwrap_or(u32::MAX),
            value,
        };
        let leaf = Size { nodes: 1, bytes: 0, depth: 1 };
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "the enum is foreign and open; what is left carries no value"
        )]
        match event {
            Event::DocumentStart(..) => *self = Self::new(self.text),
            Event::DocumentEnd => return Ok(self.root.take()),
            Event::Scalar(text, style, anchor, _) => {
                if text.len() > SCALAR_BYTES {
                    return Err(format!("a value of {} bytes, at most {SCALAR_BYTES} are allowed", text.len()));
                }
                let size = Size { bytes: text.len(), ..leaf };
                let value = if style == ScalarStyle::Plain && matches!(&*text, "" | "~" | "null" | "Null" | "NULL") {
                    Value::Nothing
                } else {
                    let source = span.slice(self.text).unwrap_or("");
                    let inset = match style {
                        ScalarStyle::Plain if source == text => Some(0),
                        ScalarStyle::SingleQuoted | ScalarStyle::DoubleQuoted
                            if source.get(1..source.len().saturating_sub(1)) == Some(&*text) =>
                        {
                            Some(1)
                        }
                        ScalarStyle::Plain
                        | ScalarStyle::SingleQuoted
                        | ScalarStyle::DoubleQuoted
                        | ScalarStyle::Literal
                        | ScalarStyle::Folded => None,
                    };
                    Value::Text(Text { inset: inset.filter(|_| !text.contains('\n')), text })
                };
                self.count(1)?;
                self.close(node(value), size, anchor)?;
            }
            Event::SequenceStart(_, anchor, _) => self.begin(node(Value::List(Vec::new())), anchor)?,
            Event::MappingStart(_, anchor, _) => self.begin(node(Value::Map(Vec::new())), anchor)?,
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(Open { mut node, anchor, size, first }) = self.open.pop() {
                    match &mut node.value {
                        Value::List(items) => *items = self.finished.drain(first..).collect(),
                        Value::Map(entries) => {
                            let mut values = self.finished.drain(first..);
                            entries.reserve_exact(values.len() / 2);
                            while let (Some(key), Some(value)) = (values.next(), values.next()) {
                                entries.push((key, value));
                            }
                        }
                        Value::Text(_) | Value::Nothing | Value::Broken => {}
                    }
                    self.close(node, size, anchor)?;
                }
            }
            Event::Alias(id) => match self.anchors.get(&id).map(|(node, size)| (node.clone(), *size)) {
                Some((copy, size)) => {
                    self.copy(size)?;
                    self.count(size.nodes)?;
                    if self.open.len() + size.depth > DEPTH {
                        return Err(format!("an alias nests values deeper than {DEPTH}"));
                    }
                    // The place where the value was written is where it must be mended.
                    self.close(copy, size, 0)?;
                }
                None => {
                    say(&span, "an alias stands inside the value it names".into(), "it would never end");
                    self.count(1)?;
                    self.close(node(Value::Broken), leaf, 0)?;
                }
            },
            Event::UnresolvedAlias(name) => {
                let what = format!("there is no anchor {}", quote(&format!("&{name}")));
                say(
                    &span,
                    what,
                    "an alias needs an anchor before it, in the same document; text that begins with * needs quotes",
                );
                self.count(1)?;
                self.close(node(Value::Broken), leaf, 0)?;
            }
            _ => {}
        }
        Ok(None)
    }

    fn begin(&mut self, node: Node<'t>, anchor: usize) -> Result<(), Refused> {
        if self.open.len() >= DEPTH {
            return Err(format!("values are nested deeper than {DEPTH}"));
        }
        self.count(1)?;
        let first = self.finished.len();
        self.open.push(Open { node, anchor, size: Size { nodes: 1, bytes: 0, depth: 1 }, first });
        Ok(())
    }

    /// Puts a finished value where it belongs.
    fn close(&mut self, node: Node<'t>, size: Size, anchor: usize) -> Result<(), Refused> {
        if anchor != 0 {
            self.copy(size)?;
            let _ = self.anchors.insert(anchor, (node.clone(), size));
        }
        let Some(parent) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        parent.size.add(size);
        self.finished.push(node);
        Ok(())
    }

    fn count(&mut self, nodes: usize) -> Result<(), Refused> {
        self.nodes += nodes;
        if self.nodes > NODES { Err(format!("more than {NODES} values")) } else { Ok(()) }
    }

    fn copy(&mut self, size: Size) -> Result<(), Refused> {
        self.copied.nodes += size.nodes;
        self.copied.bytes += size.bytes;
        if self.copied.nodes > COPIED_NODES || self.copied.bytes > COPIED_BYTES {
            return Err(format!("anchors and aliases copy more than {COPIED_NODES} values or {COPIED_BYTES} bytes"));
        }
        Ok(())
    }
}
