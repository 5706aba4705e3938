//! Rust text without its comments and literals, so that a rule sees code only.

/// Replaces comments, strings and character literals by spaces; lines stay where they are.
pub(super) fn code_only(text: &str) -> String {
    let mut rest = text;
    let mut code = String::with_capacity(text.len());
    while let Some(first) = rest.chars().next() {
        let hidden = hidden_length(rest, code.chars().next_back());
        let taken = if hidden > 0 { hidden } else { first.len_utf8() };
        let (piece, after) = rest.split_at(taken);
        if hidden > 0 {
            code.extend(piece.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        } else {
            code.push_str(piece);
        }
        rest = after;
    }
    code
}

/// The length of the comment or literal that begins here, or 0.
fn hidden_length(rest: &str, before: Option<char>) -> usize {
    let in_word = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    if rest.starts_with("//") {
        rest.find('\n').unwrap_or(rest.len())
    } else if rest.starts_with("/*") {
        block_comment_length(rest)
    } else if rest.starts_with('"') {
        string_length(rest)
    } else if !in_word && (rest.starts_with("r\"") || rest.starts_with("r#")) {
        raw_string_length(rest, 1)
    } else if !in_word && (rest.starts_with("br\"") || rest.starts_with("br#")) {
        raw_string_length(rest, 2)
    } else if rest.starts_with('\'') {
        character_length(rest)
    } else {
        0
    }
}

fn block_comment_length(rest: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        let here = &rest.as_bytes()[at..];
        if here.starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if here.starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

fn string_length(rest: &str) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// A raw string after a prefix of that length; a raw identifier such as `r#type` is not one.
fn raw_string_length(rest: &str, prefix: usize) -> usize {
    let hashes = rest[prefix..].bytes().take_while(|&b| b == b'#').count();
    let body = prefix + hashes;
    if !rest[body..].starts_with('"') {
        return 0;
    }
    let end = format!("\"{}", "#".repeat(hashes));
    rest[body + 1..].find(&end).map_or(rest.len(), |at| body + 1 + at + end.len())
}

/// A character literal; a lifetime has no closing quote where one would be.
fn character_length(rest: &str) -> usize {
    let mut chars = rest.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => {
            chars.next();
            chars.find(|&(_, c)| c == '\'').map_or(0, |(at, _)| at + 1)
        }
        Some(_) => match chars.next() {
            Some((at, '\'')) => at + 1,
            Some(_) | None => 0,
        },
        None => 0,
    }
}

/// Whether `word` stands in the code by itself, and where: 1-based line numbers.
pub(super) fn lines_with_word(code: &str, word: &str) -> Vec<usize> {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    let stands_alone = |line: &str| {
        line.match_indices(word).any(|(at, _)| {
            let before = line[..at].chars().next_back();
            let after = line[at + word.len()..].chars().next();
            let word_ends_open = word.ends_with(|c: char| !is_part(c));
            !before.is_some_and(is_part) && (word_ends_open || !after.is_some_and(is_part))
        })
    };
    code.lines().enumerate().filter(|(_, line)| stands_alone(line)).map(|(index, _)| index + 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_not_code() {
        for hidden in [
            "// unsafe\n",
            "/* a /* unsafe */ b */",
            "let a = \"x \\\" unsafe\";",
            "let a = r#\"say \"unsafe\" \"#;",
            "let a = br\"unsafe\";",
        ] {
            assert!(lines_with_word(&code_only(hidden), "unsafe").is_empty(), "{hidden}");
        }
    }

    #[test]
    fn code_after_a_literal_is_code_again() {
        for shown in [
            "let q = '\"'; unsafe {}",
            "let q = '\\''; unsafe {}",
            "fn f<'a>(x: &'a str) { unsafe {} }",
            "let r#type = 1; unsafe {}",
            "/* a */ unsafe {} // b",
        ] {
            assert_eq!(lines_with_word(&code_only(shown), "unsafe"), [1], "{shown}");
        }
    }

    #[test]
    fn a_word_is_found_only_where_it_stands_alone() {
        assert_eq!(lines_with_word("a\nunsafe {\nunsafe_code\n", "unsafe"), [2]);
        assert_eq!(lines_with_word("use aya::maps;\nmaya::x();\nuse aya_log::y;\n", "aya"), [1]);
    }
}
