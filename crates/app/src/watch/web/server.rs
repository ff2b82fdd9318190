//! Answers requests. Nothing here changes anything but who is logged in.

use std::{
    convert::Infallible,
    io::Read as _,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Form, Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Redirect, Response},
    routing::{get, post},
};
use futures_util::stream;
use serde::Deserialize;
use tokio::sync::broadcast::{self, error::RecvError};

use super::{assets, guard::Guard, metrics, model::Model, show};

/// How many pages may be open at once.
const STREAMS: usize = 32;
/// How many looks a slow page may lag behind before it is told everything anew.
const LAG: usize = 4;
/// What a wrong token costs.
const PENANCE: Duration = Duration::from_secs(1);

const NO_PAGE: &str = "<!doctype html><html lang=\"en\"><title>underpass watch</title><p>This underpass was built \
                       without its page, as there was no npm. <a href=\"/api/v1/status\">The API</a> and \
                       <a href=\"/metrics\">the metrics</a> are there.</html>";

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      form-action 'self'; frame-ancestors 'none'; base-uri 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";

/// What the watch and the server share.
pub struct Shared {
    model: Mutex<Model>,
    changes: broadcast::Sender<Bytes>,
    guard: Guard,
    streams: AtomicUsize,
}

impl Shared {
    /// Nothing is shown yet.
    pub fn new(model: Model, guard: Guard) -> Self {
        Self {
            model: Mutex::new(model),
            changes: broadcast::Sender::new(LAG),
            guard,
            streams: AtomicUsize::new(0),
        }
    }

    /// The model, for as long as the guard lives.
    pub fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the open pages what has changed. The model is locked, so that a page which is
    /// being opened gets either the state before and the changes, or the state after.
    pub fn tell(&self, model: &mut Model) -> serde_json::Result<()> {
        let changes = model.take_changes();
        if self.changes.receiver_count() > 0 {
            // That the last page has just been closed is no failure.
            let _ = self.changes.send(show::changes(model, changes)?);
        }
        Ok(())
    }
}

/// All there is to ask for.
pub fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/api/v1/connections", get(connections))
        .route("/api/v1/processes", get(processes))
        .route("/api/v1/status", get(status))
        .route("/api/v1/stream", get(pages_stream))
        .route("/metrics", get(figures))
        .route("/login", get(login_page).post(log_in))
        .route("/logout", post(log_out))
        .fallback(get(file))
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), check))
        .with_state(shared)
}

/// Every request comes by here.
async fn check(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let page = matches!(path, "/" | "/index.html");
    let mut response = match shared.guard.admits(request.method(), path, request.headers()) {
        Err(refusal) => refusal.into_response(),
        // The login page and its style hold no secret.
        Ok(()) if path == "/login" || path.starts_with("/assets/") || path == "/favicon.svg" => {
            next.run(request).await
        }
        Ok(()) if shared.guard.knows_sender(request.headers()) => next.run(request).await,
        Ok(()) if page => Redirect::to("/login").into_response(),
        Ok(()) => {
            let challenge = [(header::WWW_AUTHENTICATE, "Bearer realm=\"underpass watch\"")];
            (StatusCode::UNAUTHORIZED, challenge, "a token is needed: Authorization: Bearer TOKEN")
                .into_response()
        }
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "same-origin"),
        (header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (header::HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (
            header::HeaderName::from_static("permissions-policy"),
            "camera=(), geolocation=(), microphone=(), usb=(), payment=()",
        ),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// What the last look has found, in one form or another.
fn answer<E>(
    shared: &Shared,
    kind: &'static str,
    show: impl FnOnce(&Model) -> Result<String, E>,
) -> Response {
    match show(&shared.model()) {
        Ok(text) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn connections(State(shared): State<Arc<Shared>>, uri: Uri) -> Response {
    let with_ended = match uri.query() {
        None | Some("") => false,
        Some("ended=true") => true,
        Some(_) => return (StatusCode::BAD_REQUEST, "the only parameter is ended=true").into_response(),
    };
    answer(&shared, "application/json", |model| show::connections(model, with_ended))
}

async fn processes(State(shared): State<Arc<Shared>>) -> Response {
    answer(&shared, "application/json", show::processes)
}

async fn status(State(shared): State<Arc<Shared>>) -> Response {
    answer(&shared, "application/json", show::status)
}

async fn figures(State(shared): State<Arc<Shared>>) -> Response {
    answer(&shared, metrics::TYPE, metrics::encode)
}

/// One page more that is open, until this is dropped.
struct Place(Arc<Shared>);

impl Place {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        let before = shared.streams.fetch_add(1, Ordering::Relaxed);
        let place = Self(Arc::clone(shared));
        (before < STREAMS).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// First everything, then after each look what has changed.
async fn pages_stream(State(shared): State<Arc<Shared>>) -> Response {
    let Some(place) = Place::take(&shared) else {
        return (StatusCode::SERVICE_UNAVAILABLE, "too many pages are open").into_response();
    };
    let news: Option<broadcast::Receiver<Bytes>> = None;
    let events = stream::unfold((place, news), async |(place, news)| {
        if let Some(mut news) = news {
            match news.recv().await {
                Ok(frame) => return Some((Ok::<_, Infallible>(frame), (place, Some(news)))),
                Err(RecvError::Closed) => return None,
                // Too slow: from the beginning.
                Err(RecvError::Lagged(_)) => {}
            }
        }
        let model = place.0.model();
        let news = place.0.changes.subscribe();
        let frame = show::everything(&model).ok()?;
        drop(model);
        Some((Ok(frame), (place, Some(news))))
    });
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    (headers, Body::from_stream(events)).into_response()
}

/// The page, and what belongs to it.
async fn file(uri: Uri, headers: HeaderMap) -> Response {
    let path = if uri.path() == "/" { "/index.html" } else { uri.path() };
    embedded(path, &headers)
}

fn embedded(path: &str, headers: &HeaderMap) -> Response {
    let Some((kind, packed)) = assets::find(path) else {
        if path == "/index.html" {
            return ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], NO_PAGE).into_response();
        }
        return (StatusCode::NOT_FOUND, "there is nothing here").into_response();
    };
    // Names of files below /assets/ change with what is in them.
    let keep = if path.starts_with("/assets/") { "public, max-age=31536000, immutable" } else { "no-cache" };
    let about =
        [(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, keep), (header::VARY, "accept-encoding")];
    let accepted = headers.get(header::ACCEPT_ENCODING).and_then(|value| value.to_str().ok()).unwrap_or("");
    if accepted.split(',').any(|coding| coding.trim().split(';').next() == Some("gzip")) {
        return (about, [(header::CONTENT_ENCODING, "gzip")], packed).into_response();
    }
    let mut plain = vec![];
    match flate2::read::GzDecoder::new(packed).read_to_end(&mut plain) {
        Ok(_) => (about, plain).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn login_page(headers: HeaderMap) -> Response {
    embedded("/login.html", &headers)
}

#[derive(Deserialize)]
struct Login {
    token: String,
}

async fn log_in(State(shared): State<Arc<Shared>>, Form(login): Form<Login>) -> Response {
    match shared.guard.log_in(&login.token) {
        Some(cookie) => ([(header::SET_COOKIE, cookie)], Redirect::to("/")).into_response(),
        None => {
            tokio::time::sleep(PENANCE).await;
            Redirect::to("/login?wrong").into_response()
        }
    }
}

async fn log_out() -> Response {
    ([(header::SET_COOKIE, Guard::log_out())], Redirect::to("/login")).into_response()
}
