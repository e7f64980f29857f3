//! The hello and its answer, over TLS.

use std::io;

use belay_wire::hello::HELLO_BYTES;
use belay_wire::{ConnectionKind, FrameError, Hello, Version};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Why a client has no connection after its hello.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GreetingError {
    #[error("{0}")]
    Refused(String),
    #[error("the answer is not Belay's: {0}")]
    Foreign(FrameError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The client's part: says hello, and reads which version was selected.
pub(crate) async fn greet<S>(stream: &mut S, hello: &Hello) -> Result<Version, GreetingError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let bytes = hello.encode();
    let sent = async {
        stream.write_all(&bytes).await?;
        stream.flush().await
    }
    .await;
    let mut fixed = [0; HELLO_BYTES];
    // In TLS 1.3 a server that rejects our certificate says so only now; its alert may be there to be read although
    // our own bytes could not be sent any more, and it is the better reason.
    match (stream.read_exact(&mut fixed).await, sent) {
        (Ok(_), _) => {}
        (Err(read), Err(_)) if read.kind() == io::ErrorKind::InvalidData => return Err(read.into()),
        (Err(_), Err(sent)) => return Err(sent.into()),
        (Err(read), Ok(())) => return Err(read.into()),
    }
    match Hello::decode_answer(&fixed).map_err(GreetingError::Foreign)? {
        Ok(version) if (hello.min..=hello.max).contains(&version) => Ok(version),
        Ok(_) => Err(GreetingError::Foreign(FrameError::Payload("a version that was not offered"))),
        Err(reason_bytes) => {
            let mut reason = vec![0; reason_bytes];
            stream.read_exact(&mut reason).await?;
            Err(GreetingError::Refused(String::from_utf8_lossy(&reason).escape_debug().to_string()))
        }
    }
}

/// What the server read first.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Greeting {
    /// A hello in a version that we speak.
    Welcome { kind: ConnectionKind, version: Version },
    /// A hello that we refuse, with the reason to answer.
    Refuse(String),
    /// Closed without a word, as the losers of a dialling race do.
    Nothing,
}

/// The server's first half: reads the hello. The answer is sent by [`answer`].
pub(crate) async fn read_hello<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Greeting> {
    let mut bytes = [0; HELLO_BYTES];
    let mut filled = 0;
    while filled < HELLO_BYTES {
        match stream.read(&mut bytes[filled..]).await {
            Ok(0) if filled == 0 => return Ok(Greeting::Nothing),
            Err(error) if filled == 0 && is_end(&error) => return Ok(Greeting::Nothing),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) => return Err(error),
        }
    }
    judge(&bytes)
}

/// Whether the peer ended the connection, without TLS's farewell.
pub(crate) fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
}

fn judge(bytes: &[u8; HELLO_BYTES]) -> io::Result<Greeting> {
    let hello = match Hello::decode(bytes) {
        Ok(hello) => hello,
        Err(FrameError::Kind(kind)) => {
            return Ok(Greeting::Refuse(format!("connections of kind {kind} are not known to this version")));
        }
        Err(other) => return Err(io::Error::new(io::ErrorKind::InvalidData, other)),
    };
    Ok(match hello.select() {
        Some(version) => Greeting::Welcome { kind: hello.kind, version },
        None => Greeting::Refuse(format!(
            "no common version: the caller speaks {} to {}, this agent {} to {}; upgrade the older one",
            hello.min.0,
            hello.max.0,
            belay_wire::hello::OLDEST.0,
            belay_wire::hello::NEWEST.0
        )),
    })
}

/// The server's second half: the version selected, or a refusal with its reason.
pub(crate) async fn answer<S>(stream: &mut S, outcome: Result<Version, &str>) -> io::Result<()>
where
    S: AsyncWrite + Unpin,
{
    stream.write_all(&Hello::answer(outcome)).await?;
    stream.flush().await
}
