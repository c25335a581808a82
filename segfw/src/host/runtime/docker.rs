//! Docker's API, HTTP/1.1 over a unix socket: Docker Engine, and Podman's service, which speaks it too.

use super::grpc::chain;
use super::limits::{ANSWER_BYTES, Answer, Bounded};
use crate::policy::container::{ContainerFacts, Kind, qualified};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderMap};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;
use tokio::net::UnixStream;

/// Without a version the daemon answers in its own newest one, and the fields that are read are in all of them.
const LIST: &str = "/containers/json?all=1";

/// Bytes of an error's text that are shown.
const ERROR_BYTES: usize = 200;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Summary {
    id: String,
    #[serde(default)]
    names: Option<Vec<String>>,
    #[serde(default)]
    image: Option<String>,
    #[serde(default, rename = "ImageID")]
    image_id: Option<String>,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
}

/// Containers, running or not.
pub(super) async fn list(socket: &Path, owner: u32, answer: &mut Answer) -> Result<Kind, String> {
    let (mut status, mut headers, mut body) = get(socket, LIST).await?;
    // A daemon that refuses to be asked without a version says which one it speaks.
    if matches!(status, StatusCode::BAD_REQUEST | StatusCode::NOT_FOUND)
        && let Some(version) = version(&headers).or(version(&get(socket, "/_ping").await?.1))
    {
        (status, headers, body) = get(socket, &format!("/v{version}{LIST}")).await?;
    }
    if status != StatusCode::OK {
        let text = String::from_utf8_lossy(body.get(..ERROR_BYTES.min(body.len())).unwrap_or_default()).into_owned();
        return Err(format!("it answers {status} to GET {LIST}: {}", text.trim().escape_debug()));
    }
    let kind = if headers.contains_key("Libpod-Api-Version") { Kind::Podman } else { Kind::Docker };
    read(&body, kind, owner, answer)?;
    Ok(kind)
}

fn read(body: &[u8], kind: Kind, owner: u32, answer: &mut Answer) -> Result<(), String> {
    let list: Bounded<Summary> =
        serde_json::from_slice(body).map_err(|e| format!("its list of containers cannot be read: {e}"))?;
    answer.left_out += list.left_out;
    for summary in list.items {
        let id = answer.text(summary.id);
        if id.is_empty() || !answer.room() {
            continue;
        }
        let mut facts = ContainerFacts::new(kind, id, owner);
        // `/name`, and `/other/alias` for links to it.
        let names = summary.names.unwrap_or_default();
        let name = names.iter().find_map(|n| n.strip_prefix('/').filter(|n| !n.contains('/')));
        facts.name = answer.text(name.unwrap_or_default().to_owned());
        let image = summary.image.unwrap_or_default();
        let image_id = summary.image_id.unwrap_or_default();
        // `docker run 89eeb1753be1`: not a name on Docker Hub.
        let by_id = image.len() >= 12 && image_id.trim_start_matches("sha256:").starts_with(&image);
        facts.image = answer.text(qualified(if by_id { &image_id } else { &image }));
        facts.labels = answer.labels(summary.labels.unwrap_or_default());
        answer.containers.push(facts);
    }
    Ok(())
}

/// `Api-Version: 1.41`, if it is a version.
fn version(headers: &HeaderMap) -> Option<String> {
    let text = headers.get("Api-Version")?.to_str().ok()?;
    (text.len() <= 8 && text.bytes().all(|b| b.is_ascii_digit() || b == b'.')).then(|| text.to_owned())
}

async fn get(socket: &Path, path: &str) -> Result<(StatusCode, HeaderMap, Bytes), String> {
    let stream = UnixStream::connect(socket).await.map_err(|e| format!("cannot connect: {e}"))?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|e| format!("no HTTP there: {}", chain(&e)))?;
    let request = Request::get(path).header(HOST, "localhost").body(Empty::<Bytes>::new());
    let request = request.map_err(|e| chain(&e))?;
    let talk = async {
        let answer = sender.send_request(request).await.map_err(|e| format!("GET {path}: {}", chain(&e)))?;
        let (parts, body) = answer.into_parts();
        let body = Limited::new(body, ANSWER_BYTES).collect().await.map_err(|e| format!("GET {path}: {e}"))?;
        Ok((parts.status, parts.headers, body.to_bytes()))
    };
    // The connection has to be driven beside the request; it ends first only if it breaks.
    let mut connection = std::pin::pin!(connection);
    let mut talk = std::pin::pin!(talk);
    tokio::select! {
        biased;
        end = &mut talk => end,
        _ = &mut connection => talk.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Docker 20.10 answers, less the fields that are not read.
    const DOCKER: &str = r#"[
      {"Id":"7be92808767a667f35c8505cbf40d14e931ef6db5b0210329cf193b15ba9d605","Names":["/other/db","/shop-db"],
       "Image":"postgres:16","ImageID":"sha256:89eeb1753be1f6a64e37a883c0a2951b5603b00751992a1c3a5583c64171315d",
       "Command":"docker-entrypoint.sh","Created":1700000000,"Ports":[],"State":"running","Status":"Up",
       "Labels":{"com.docker.compose.service":"db"},"HostConfig":{"NetworkMode":"bridge"},"Mounts":[]},
      {"Id":"0ba8ac17e4e7a31fb82279503552fe94e64bab4745bf6fd2ff231e7c8ca8bed0","Names":null,
       "Image":"89eeb1753be1","ImageID":"sha256:89eeb1753be1f6a64e37a883c0a2951b5603b00751992a1c3a5583c64171315d",
       "Labels":null}]"#;

    #[test]
    fn lists() {
        let mut answer = Answer::default();
        read(DOCKER.as_bytes(), Kind::Docker, 0, &mut answer).unwrap();
        let [first, second] = &answer.containers[..] else { panic!("{answer:?}") };
        assert_eq!((first.name.as_str(), first.image.as_str()), ("shop-db", "docker.io/library/postgres:16"));
        assert_eq!(first.labels["com.docker.compose.service"], "db");
        assert_eq!(
            (second.name.as_str(), second.image.as_str()),
            ("", "sha256:89eeb1753be1f6a64e37a883c0a2951b5603b00751992a1c3a5583c64171315d")
        );
        for wrong in ["", "{}", "[{}]", "[{\"Id\":7}]", "\u{0}"] {
            assert!(read(wrong.as_bytes(), Kind::Docker, 0, &mut Answer::default()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn versions() {
        let of = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("Api-Version", hyper::header::HeaderValue::from_static(text));
            version(&headers)
        };
        assert_eq!(of("1.41").as_deref(), Some("1.41"));
        for wrong in ["", "1/../x", "1.41111111"] {
            assert_eq!(of(wrong).filter(|v| !v.is_empty()), None, "{wrong}");
        }
    }
}
