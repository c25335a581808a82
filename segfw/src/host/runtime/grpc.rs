//! One call over a `unix:` socket.

use super::limits::{ANSWER_BYTES, DEADLINE};
use hyper::http::uri::PathAndQuery;
use std::path::Path;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;

/// Header of containerd's own API.
const NAMESPACE: &str = "containerd-namespace";

/// A channel that connects when it is first used, and again after the runtime has restarted.
pub(super) fn channel(socket: &Path) -> Result<Channel, String> {
    let path = socket.to_str().ok_or("the path of the socket is not UTF-8")?;
    let endpoint = Endpoint::from_shared(format!("unix:{path}")).map_err(|e| chain(&e))?;
    Ok(endpoint.connect_timeout(DEADLINE).connect_lazy())
}

async fn prepared<Q>(
    channel: &Channel,
    namespace: Option<&str>,
    ask: Q,
) -> Result<(Grpc<Channel>, Request<Q>), Status> {
    let mut grpc = Grpc::new(channel.clone()).max_decoding_message_size(ANSWER_BYTES);
    grpc.ready().await.map_err(|e| Status::unavailable(chain(&e)))?;
    let mut request = Request::new(ask);
    if let Some(namespace) = namespace {
        let value = namespace.parse().map_err(|_| Status::invalid_argument("a namespace that is no header value"))?;
        request.metadata_mut().insert(NAMESPACE, value);
    }
    Ok((grpc, request))
}

/// One question, one answer.
pub(super) async fn unary<Q, A>(
    channel: &Channel,
    path: &'static str,
    namespace: Option<&str>,
    ask: Q,
) -> Result<A, Status>
where
    Q: prost::Message + 'static,
    A: prost::Message + Default + 'static,
{
    let (mut grpc, request) = prepared(channel, namespace, ask).await?;
    let codec: ProstCodec<Q, A> = ProstCodec::default();
    Ok(grpc.unary(request, PathAndQuery::from_static(path), codec).await?.into_inner())
}

/// One question, a stream of answers.
pub(super) async fn stream<Q, A>(
    channel: &Channel,
    path: &'static str,
    namespace: Option<&str>,
    ask: Q,
) -> Result<Streaming<A>, Status>
where
    Q: prost::Message + 'static,
    A: prost::Message + Default + 'static,
{
    let (mut grpc, request) = prepared(channel, namespace, ask).await?;
    let codec: ProstCodec<Q, A> = ProstCodec::default();
    Ok(grpc.server_streaming(request, PathAndQuery::from_static(path), codec).await?.into_inner())
}

/// What went wrong, for a person.
pub(super) fn why(status: &Status) -> String {
    match std::error::Error::source(status) {
        Some(source) => format!("{:?}: {}", status.code(), chain(source)),
        None if status.message().is_empty() => format!("{:?}", status.code()),
        None => format!("{:?}: {}", status.code(), status.message()),
    }
}

/// The service does not exist there.
pub(super) fn is_unimplemented(status: &Status) -> bool {
    status.code() == Code::Unimplemented
}

/// An error and its causes: the outermost of a transport says nothing but "transport error".
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        // Many say their cause themselves.
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
