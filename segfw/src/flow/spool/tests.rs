use super::*;
use crate::flow::history::History;
use crate::flow::query::{Clause, Filter, Query};
use crate::flow::record::{enrich, tests as fixed};
use std::os::unix::fs::PermissionsExt;

/// Record `n`: of CPU 0, a second after the one before it.
fn item(n: u64) -> Item {
    let mut event = fixed::event();
    event.sequence = n;
    event.time += n * 1_000_000_000;
    event.local_port = if n.is_multiple_of(2) { 5432 } else { 80 };
    Item::Flow(Box::new(enrich(&event, &fixed::names())))
}

fn place(dir: &Path) -> Place {
    Place { dir: dir.to_owned(), max_bytes: 4 * LEAST_FILE_BYTES, file_bytes: LEAST_FILE_BYTES }
}

fn spool(dir: &Path) -> Spool {
    Spool::start(place(dir), "h".into()).unwrap()
}

/// Waits until the queue is empty, so that a test chooses what overflows.
fn fill(spool: &Spool, numbers: std::ops::Range<u64>) {
    for n in numbers {
        spool.push(&Arc::new(item(n)));
        if n.is_multiple_of(1000) {
            spool.flush();
        }
    }
    spool.flush();
}

/// What a query finds in files and memory together: numbers of records, `lost N` for marks.
fn found(history: &History, query: &Query) -> Vec<String> {
    let past = history.past(query);
    let mut all = Vec::new();
    let show = |item: &Item| match item {
        Item::Flow(record) => record.sequence.unwrap().to_string(),
        Item::Lost(loss) => format!("lost {}", loss.lost),
    };
    if let Some(older) = past.older {
        let (handed, unreadable) = older
            .read(|item| {
                all.push(show(&item));
                true
            })
            .unwrap();
        assert_eq!((handed, unreadable), (all.len(), 0));
    }
    let room = query.first.map_or(usize::MAX, |first| first - all.len());
    all.extend(past.recent.iter().map(|item| show(item)).take(room));
    all
}

fn numbers(range: std::ops::Range<u64>) -> Vec<String> {
    range.map(|n| n.to_string()).collect()
}

#[test]
fn files_and_memory_are_one_history() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("a/flows");
    let history = History::spooled("h".into(), 10, Some(spool(&dir)));
    for n in 0..50 {
        history.push(item(n));
    }
    // Some are in the files, some still wait, ten are in memory: each is there once, whatever was written.
    for flush in [false, true] {
        if flush {
            history.spool().unwrap().flush();
            assert_eq!(found(&history, &Query::default()), numbers(0..50));
        }
        assert_eq!(found(&history, &Query { last: Some(4), ..Query::default() }), numbers(46..50));
    }
    let at = |n: u64| Some(item(n).time());
    let of = |query: Query| found(&history, &query);
    assert_eq!(of(Query { first: Some(3), ..Query::default() }), numbers(0..3));
    assert_eq!(of(Query { last: Some(30), ..Query::default() }), numbers(20..50));
    assert_eq!(of(Query { since: at(12), ..Query::default() }), numbers(12..50));
    assert_eq!(of(Query { since: at(12), until: at(14), ..Query::default() }), numbers(12..15));
    assert_eq!(of(Query { since: at(30), first: Some(15), ..Query::default() }), numbers(30..45));
    assert_eq!(of(Query { until: at(20), last: Some(2), ..Query::default() }), numbers(19..21));
    let filter = Filter(vec![Clause::parse("to-port", "80", false).unwrap()]);
    let odd = of(Query { filter, last: Some(20), ..Query::default() });
    assert_eq!(odd, (5..25).map(|n| (2 * n + 1).to_string()).collect::<Vec<_>>());
    // What memory can say alone needs no file.
    assert!(history.past(&Query { last: Some(10), ..Query::default() }).older.is_none());
    assert!(history.past(&Query { since: at(47), ..Query::default() }).older.is_none());
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    let file = files::list(&dir).unwrap().remove(0).path;
    assert_eq!((mode(&dir), mode(&file)), (0o700, 0o600));
}

#[test]
fn the_next_agent_goes_on_where_the_last_one_ended() {
    let dir = tempfile::tempdir().unwrap();
    fill(&spool(dir.path()), 0..20);
    let file = files::list(dir.path()).unwrap().remove(0);
    // Killed while it wrote.
    let mut text = std::fs::read(&file.path).unwrap();
    text.extend_from_slice(b"{\"time\":\"2026-11-21T20:");
    std::fs::write(&file.path, &text).unwrap();
    let history = History::spooled("h".into(), 10, Some(spool(dir.path())));
    let next = history.spool().unwrap();
    assert_eq!(next.newest()[&0], Newest { sequence: 19, time: item(19).time() });
    assert_eq!(next.counts().torn.load(Ordering::Relaxed), 1);
    assert_eq!(next.counts().kept.load(Ordering::Relaxed), 20);
    fill(next, 20..25);
    assert_eq!(files::list(dir.path()).unwrap().len(), 1);
    assert_eq!(found(&history, &Query::default()), numbers(0..25));
    assert_eq!(found(&history, &Query { last: Some(6), ..Query::default() }), numbers(19..25));
}

#[test]
fn the_oldest_files_make_room_and_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let history = History::spooled("h".into(), 1, Some(spool(dir.path())));
    let spool = history.spool().unwrap();
    for from in (0..1000).step_by(50) {
        fill(spool, from..from + 50);
    }
    let files = files::list(dir.path()).unwrap();
    let bytes: u64 = files.iter().map(|f| f.bytes).sum();
    assert!(bytes <= 4 * LEAST_FILE_BYTES && files.iter().all(|f| f.bytes <= LEAST_FILE_BYTES), "{files:?}");
    let count = |c: &AtomicU64| c.load(Ordering::Relaxed);
    let counts = spool.counts();
    let dropped = count(&counts.dropped);
    assert!(dropped > 0 && dropped == files[0].first);
    assert_eq!((count(&counts.written), count(&counts.kept), count(&counts.lost)), (1000, 1000 - dropped, 0));
    assert_eq!((count(&counts.bytes), count(&counts.files)), (bytes, files.len() as u64));
    assert_eq!(found(&history, &Query::default()), numbers(dropped..1000));
    // The difference of two names is what a file holds.
    for pair in files.windows(2) {
        assert_eq!(files::scan(&pair[0].path).unwrap().records, pair[1].first - pair[0].first);
    }
    // Counted over the life of the folder.
    assert_eq!(count(&super::tests::spool(dir.path()).counts().dropped), dropped);
}

#[test]
fn what_cannot_be_written_is_told_when_writing_works_again() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("flows");
    // Something else is there.
    std::fs::write(&place, "").unwrap();
    let history = History::spooled("h".into(), 1, Some(spool(&place)));
    let spool = history.spool().unwrap();
    assert!(spool.counts().failing().is_some());
    fill(spool, 0..5);
    spool.push(&Arc::new(Item::Flow(Box::new(fixed::denials()))));
    spool.push(&Arc::new(Item::Lost(Loss { lost: 100, ..mark(&item(5)) })));
    spool.flush();
    assert_eq!(spool.counts().lost.load(Ordering::Relaxed), 6);
    std::fs::remove_file(&place).unwrap();
    fill(spool, 6..8);
    assert_eq!(spool.counts().failing(), None);
    assert_eq!(found(&history, &Query::default()), ["lost 105", "6", "7"]);
    let file = files::list(&place).unwrap().remove(0).path;
    let text = std::fs::read_to_string(&file).unwrap();
    let first: Item = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    let Item::Lost(loss) = first else { panic!("{first:?}") };
    // Beside the numbered ones the sum of 1,200 denials.
    assert_eq!((loss.lost_in, loss.lost, loss.denials), (LostIn::Spool, 105, 1200));
    // Somebody removes the folder: the next record makes it again.
    std::fs::remove_dir_all(&place).unwrap();
    fill(spool, 8..9);
    assert_eq!(found(&history, &Query::default()), ["8"]);
}

fn mark(item: &Item) -> Loss {
    let mut missing = Missing::default();
    missing.add(item);
    let Some(Item::Lost(loss)) = missing.mark(&"h".into()) else { panic!("no mark") };
    loss
}

#[test]
fn what_the_queue_has_no_room_for_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let spool = spool(dir.path());
    let one = Arc::new(item(1));
    // More than the writer can take away meanwhile.
    let pushed = 2 * WAITING as u64;
    for _ in 0..pushed {
        spool.push(&one);
    }
    let lost = spool.counts().lost.load(Ordering::Relaxed);
    spool.flush();
    spool.flush();
    let counts = spool.counts();
    let end = Instant::now() + Duration::from_secs(10);
    while counts.written.load(Ordering::Relaxed) + lost < pushed && Instant::now() < end {
        spool.flush();
    }
    assert_eq!(counts.written.load(Ordering::Relaxed) + lost, pushed);
    let mut told = 0;
    for file in files::list(dir.path()).unwrap() {
        let _ = files::lines(&file.path, |line| {
            if let Ok(Item::Lost(loss)) = serde_json::from_slice(line) {
                told += loss.lost;
            }
            true
        })
        .unwrap();
    }
    // The first files are gone with what they told.
    assert!(told <= lost, "{told} of {lost}");
}

#[test]
fn sizes_that_cannot_work_are_raised() {
    let settled = Place { dir: "x".into(), max_bytes: 1, file_bytes: 1 << 40 }.settled();
    assert_eq!((settled.max_bytes, settled.file_bytes), (4 * LEAST_FILE_BYTES, LEAST_FILE_BYTES));
}
