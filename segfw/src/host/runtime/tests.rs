use super::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::Instant;

const A: &str = "7be92808767a667f35c8505cbf40d14e931ef6db5b0210329cf193b15ba9d605";
const B: &str = "0ba8ac17e4e7a31fb82279503552fe94e64bab4745bf6fd2ff231e7c8ca8bed0";
const UID: &str = "2fc932ce-fdcc-454b-97bd-aadfdeb4c340";

fn facts(runtime: Kind, id: &str, owner: u32, name: &str) -> ContainerFacts {
    ContainerFacts { name: name.into(), ..ContainerFacts::new(runtime, id.into(), owner) }
}

fn found(listing: &Listing, path: &str) -> Option<String> {
    let path = path.replace("{A}", A).replace("{B}", B).replace("{UID}", UID);
    listing.find(Path::new(&path)).map(|c| c.name.clone())
}

#[test]
fn containers_are_found_by_their_cgroups() {
    let listing = Listing::of(vec![
        facts(Kind::Containerd, A, 0, "cri"),
        facts(Kind::Docker, B, 0, "docker"),
        ContainerFacts { cgroup: Some("/default/web".into()), ..facts(Kind::Containerd, "web", 0, "ctr") },
    ]);
    for (path, expected) in [
        ("/kubepods/burstable/pod{UID}/{A}", Some("cri")),
        ("/kubepods.slice/kubepods-pod{UID}.slice/cri-containerd-{A}.scope", Some("cri")),
        ("/docker/{B}", Some("docker")),
        ("/system.slice/docker-{B}.scope", Some("docker")),
        ("/default/web", Some("ctr")),
        // Neither a runtime's id in the name of another runtime, nor names that no runtime told.
        ("/docker/{A}", None),
        ("/system.slice/cri-containerd-{B}.scope", None),
        ("/mine/{B}", None),
        ("/lxc.payload.x/docker/{B}", None),
        ("/other/web", None),
        // Below a container it is the container's own word.
        ("/docker/{B}/kubepods/pod{UID}/{A}", None),
        ("/docker/{B}/docker/{B}", None),
        ("/system.slice/docker-{B}.scope/cri-containerd-{A}.scope", None),
        // So it is in a service that may make cgroups, and in a user's slice.
        ("/system.slice/evil.service/docker/{B}", None),
        ("/system.slice/evil.service/{B}", None),
        ("/user.slice/user-1000.slice/user@1000.service/docker-{B}.scope", None),
        ("/user.slice/user-1000.slice/user@1000.service/docker/{B}", None),
        ("/", None),
    ] {
        assert_eq!(found(&listing, path).as_deref(), expected, "{path}");
    }
}

#[test]
fn a_service_that_may_make_cgroups_needs_its_runtimes_word() {
    let quadlet = format!("/system.slice/web.service/libpod-payload-{A}");
    let listing = Listing::of(vec![
        ContainerFacts { cgroup: Some(quadlet.clone()), ..facts(Kind::Podman, A, 0, "web") },
        facts(Kind::Podman, B, 0, "db"),
    ]);
    assert_eq!(found(&listing, &quadlet).as_deref(), Some("web"));
    assert_eq!(found(&listing, "/system.slice/evil.service/libpod-payload-{A}"), None);
    assert_eq!(found(&listing, "/system.slice/evil.service/libpod-payload-{B}"), None);
    assert_eq!(found(&listing, "/machine.slice/libpod-{B}.scope").as_deref(), Some("db"));
}

#[test]
fn a_users_runtime_speaks_of_his_slice_only() {
    let own = format!("/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{A}.scope");
    let listing = Listing::of(vec![
        facts(Kind::Podman, A, 1000, "his"),
        ContainerFacts { cgroup: Some("/system.slice/nginx.service".into()), ..facts(Kind::Podman, B, 1000, "claim") },
        ContainerFacts { cgroup: Some("/user.slice/user-1000.slice/x".into()), ..facts(Kind::Podman, "x", 1000, "x") },
    ]);
    assert_eq!(found(&listing, &own).as_deref(), Some("his"));
    assert_eq!(found(&listing, &own.replace("1000", "1001")), None);
    assert_eq!(found(&listing, "/machine.slice/libpod-{A}.scope"), None);
    assert_eq!(found(&listing, "/system.slice/nginx.service"), None);
    assert_eq!(found(&listing, "/user.slice/user-1000.slice/x").as_deref(), Some("x"));
    assert_eq!(listing.left_out, 1);
}

#[test]
fn what_several_sources_say_is_joined() {
    let pod = PodFacts { name: "p".into(), ..PodFacts::default() };
    let api = ContainerFacts { labels: [("app".into(), "x".into())].into(), ..facts(Kind::Podman, A, 0, "api") };
    let folder = ContainerFacts {
        cgroup: Some("/c".into()),
        image: "i".into(),
        pod: Some(pod.clone()),
        ..facts(Kind::Podman, A, 0, "folder")
    };
    let other = facts(Kind::Docker, A, 0, "docker");
    let in_pod = |owner| ContainerFacts {
        pod: Some(PodFacts { uid: format!("u{owner}"), ..PodFacts::default() }),
        ..facts(Kind::Containerd, B, owner, "")
    };
    let pods = Listing::of(vec![in_pod(0), in_pod(1000)]);
    assert!(pods.pod("u0").is_some() && pods.pod("u1000").is_none() && pods.pod("").is_none());
    let listing = Listing::of(vec![api, folder, other]);
    assert_eq!(listing.containers.len(), 2, "Docker's is another one");
    let joined = &listing.containers[0];
    assert_eq!((joined.name.as_str(), joined.image.as_str(), &joined.pod), ("api", "i", &Some(pod)));
    assert_eq!(joined.labels.len(), 1);
    assert_eq!(found(&listing, "/c").as_deref(), Some("api"));
    // Names of containerd are unique in their namespace only.
    let of = |cgroup: &str, name: &str| ContainerFacts {
        cgroup: Some(cgroup.into()),
        ..facts(Kind::Containerd, "web", 0, name)
    };
    let listing = Listing::of(vec![of("/a/web", "first"), of("/b/web", "second")]);
    assert_eq!(found(&listing, "/a/web").as_deref(), Some("first"));
    assert_eq!(found(&listing, "/b/web").as_deref(), Some("second"));
}

/// A server that gives one answer per connection, by the first line of what it was asked.
fn serve(socket: &Path, answer: impl Fn(&str) -> Vec<u8> + Send + 'static) {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut asked = vec![0; 4_096];
            let n = stream.read(&mut asked).unwrap_or(0);
            let asked = String::from_utf8_lossy(&asked[..n]);
            let _ = stream.write_all(&answer(asked.lines().next().unwrap_or_default()));
        }
    });
}

fn http(status: &str, headers: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

fn config(dir: &Path, cri: &[&str], docker: &[&str], storage: &[&str]) -> RuntimeConfig {
    let paths = |names: &[&str]| names.iter().map(|n| dir.join(n)).collect();
    RuntimeConfig { cri: paths(cri), docker: paths(docker), storage: paths(storage) }
}

#[tokio::test]
async fn dockers_answers() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let list =
        format!(r#"[{{"Id":"{A}","Names":["/web"],"Image":"nginx","ImageID":"sha256:1","Labels":{{"a":"b"}}}}]"#);
    let engine = list.clone();
    // Docker 20.10.24 answers without a version.
    serve(&at("docker"), move |asked| match asked {
        "GET /containers/json?all=1 HTTP/1.1" => http("200 OK", "Api-Version: 1.41\r\n", &engine),
        other => http("500 Internal Server Error", "", other),
    });
    // One that must be told the version, and says it only to a ping.
    let strict = list.replace(A, B);
    serve(&at("strict"), move |asked| match asked {
        "GET /containers/json?all=1 HTTP/1.1" => http("400 Bad Request", "", "{}"),
        "GET /_ping HTTP/1.1" => http("200 OK", "Api-Version: 1.24\r\n", "OK"),
        "GET /v1.24/containers/json?all=1 HTTP/1.1" => http("200 OK", "Libpod-Api-Version: 9.0.0\r\n", &strict),
        other => http("500 Internal Server Error", "", other),
    });
    std::os::unix::fs::symlink(at("docker"), at("again")).unwrap();
    let config = config(dir.path(), &["none"], &["docker", "strict", "again", "absent"], &["docker/x", "absent"]);
    let mut runtimes = Runtimes::new(&config);
    for _ in 0..3 {
        let listing = runtimes.list().await;
        assert_eq!(listing.failed, []);
        assert_eq!(listing.reachable, [at("docker"), at("strict")]);
        let [docker, podman] = &listing.containers[..] else { panic!("{listing:?}") };
        assert_eq!(
            (docker.runtime, docker.name.as_str(), docker.image.as_str()),
            (Kind::Docker, "web", "docker.io/library/nginx:latest")
        );
        assert_eq!((podman.runtime, podman.labels.len()), (Kind::Podman, 1));
        // Not finished: the next call is none the worse.
        drop(tokio::time::timeout(std::time::Duration::ZERO, runtimes.list()).await);
    }
}

#[tokio::test]
async fn hostile_answers_are_failures_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    serve(&at("garbage"), |_| vec![0xff; 10_000]);
    serve(&at("closes"), |_| Vec::new());
    serve(&at("denies"), |_| http("403 Forbidden", "", "\u{1b}[2Jno"));
    serve(&at("large"), |_| {
        let mut answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n[".to_vec();
        answer.resize(limits::ANSWER_BYTES + 1_000, b' ');
        answer
    });
    serve(&at("grpc"), |_| vec![0; 10_000]);
    let _hung = UnixListener::bind(at("hung")).unwrap();
    drop(UnixListener::bind(at("gone")).unwrap());
    fs::write(at("file"), "").unwrap();
    let names = ["garbage", "closes", "denies", "large", "gone"];
    let config = config(dir.path(), &["grpc", "hung"], &names, &["file"]);
    let begin = Instant::now();
    let listing = Runtimes::new(&config).list().await;
    assert!(begin.elapsed() < DEADLINE * 2, "{:?}", begin.elapsed());
    assert_eq!((listing.containers.len(), listing.reachable.len()), (0, 0));
    let why: HashMap<String, String> = listing
        .failed
        .iter()
        .map(|(place, why)| (place.file_name().unwrap().to_string_lossy().into_owned(), why.clone()))
        .collect();
    assert_eq!(why.len(), names.len() + 3, "{why:?}");
    assert_eq!(why["hung"], "no answer within 2 s");
    assert!(why["gone"].starts_with("cannot connect: "), "{why:?}");
    assert!(why["denies"].contains("403 Forbidden") && !why["denies"].contains('\u{1b}'), "{why:?}");
    assert!(why["large"].contains("length limit exceeded"), "{why:?}");
}
