//! The control API: HTTP and JSON on a Unix socket, described by OpenAPI.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use belay_attach::{Command, Notice};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use tokio_stream::wrappers::BroadcastStream;
use utoipa::{OpenApi, ToSchema};

use crate::adopt::AdoptedView;
use crate::agent::Agent;
use crate::error::AgentError;
use crate::events::Event;
use crate::ledger::Mode;
use crate::new_device::NewDevice;
use crate::offer::{OfferView, WithdrawView};
use crate::operation::OperationView;
use crate::view::{DeviceView, device_view};
use crate::vm::VmView;

/// What the metrics are.
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Shared = State<Arc<Agent>>;
type Answer<T> = Result<Json<T>, AgentError>;

impl IntoResponse for AgentError {
    fn into_response(self) -> Response {
        let status = match self.code.as_str() {
            "usage" => StatusCode::BAD_REQUEST,
            "not_found" => StatusCode::NOT_FOUND,
            "precheck" | "fenced" | "cancelled" => StatusCode::CONFLICT,
            "unreachable" => StatusCode::BAD_GATEWAY,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self)).into_response()
    }
}

/// Everything at a glance.
#[derive(Serialize, ToSchema)]
pub struct StatusView {
    /// This host.
    host: String,
    /// The agent's version.
    version: String,
    /// Devices.
    devices: Vec<DeviceView>,
    /// VMs.
    vms: Vec<VmView>,
    /// Other hosts.
    hosts: Vec<HostView>,
    /// Operations since the agent started.
    operations: Vec<OperationView>,
}

/// A known host.
#[derive(Serialize, ToSchema)]
pub struct HostView {
    /// Its name.
    name: String,
    /// Where its agent is.
    addresses: Vec<String>,
}

/// A new size.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    size_bytes: u64,
}

/// An exchange to begin or change.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExchangeBody {
    /// Bytes per second; none: no limit.
    bandwidth: Option<u64>,
    /// Where the disk comes to.
    #[schema(value_type = Option<String>)]
    path: Option<PathBuf>,
}

/// A VM to be started.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunVm {
    spec_toml: String,
    /// Where relative paths of kernel, initrd and qemu start.
    #[schema(value_type = Option<String>)]
    folder: Option<PathBuf>,
}

/// A VM to be adopted.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AdoptVm {
    name: String,
    #[schema(value_type = String)]
    qmp: PathBuf,
    /// Devices that are recognised by their socket's file name; without any, by its path.
    #[serde(default)]
    devices: Vec<String>,
}

/// A migration.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateBody {
    to: String,
    /// `follow` (default) or `stay`.
    #[serde(default)]
    #[schema(value_type = String)]
    mode: Mode,
    /// Limit of the memory transfer, bytes per second.
    bandwidth: Option<u64>,
    #[serde(default)]
    dry_run: bool,
}

/// An offer of a device to another host.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OfferBody {
    to: String,
    /// `follow` (default) or `stay`.
    #[serde(default)]
    #[schema(value_type = String)]
    mode: Mode,
    /// Only check whether it could be.
    #[serde(default)]
    dry_run: bool,
}

/// The outcome of an abort.
#[derive(Serialize, ToSchema)]
pub struct Aborted {
    aborted: bool,
    message: String,
}

#[derive(Deserialize, utoipa::IntoParams)]
struct Follow {
    /// Do not end with what is kept.
    #[serde(default)]
    follow: bool,
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Belay", description = "Control API of a Belay agent"),
    paths(
        status,
        devices,
        device,
        add_device,
        remove_device,
        resize,
        offer,
        withdraw,
        exchange,
        exchange_limit,
        exchange_cancel,
        vms,
        run_vm,
        adopt_vm,
        stop_vm,
        migrate,
        operation,
        abort,
        events,
        metrics,
        openapi
    ),
    components(schemas(AgentError))
)]
struct Description;

/// The API's description. What all calls have in common is added here: the names in their paths, and errors.
fn description() -> utoipa::openapi::OpenApi {
    use utoipa::openapi::path::{ParameterBuilder, ParameterIn};
    use utoipa::openapi::{ContentBuilder, Ref, RefOr, Required, ResponseBuilder, schema};
    let mut description = Description::openapi();
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("AgentError"))).build();
    let error = ResponseBuilder::new()
        .description("It was not done, and why")
        .content("application/json", content)
        .build();
    for (path, item) in &mut description.paths.paths {
        let named: Vec<&str> =
            path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')).collect();
        for call in [&mut item.get, &mut item.post, &mut item.patch, &mut item.delete].into_iter().flatten() {
            call.responses.responses.insert("default".to_owned(), error.clone().into());
            let parameters = call.parameters.get_or_insert_default();
            for name in &named {
                if parameters.iter().any(|known| matches!(known, RefOr::T(known) if known.name == *name)) {
                    continue;
                }
                let text = schema::ObjectBuilder::new().schema_type(schema::Type::String).build();
                let parameter = ParameterBuilder::new()
                    .name(*name)
                    .parameter_in(ParameterIn::Path)
                    .required(Required::True)
                    .schema(Some(text));
                parameters.push(parameter.build().into());
            }
        }
    }
    description
}

/// The whole API.
pub fn router(agent: Arc<Agent>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/events", get(events))
        .route("/v1/devices", get(devices).post(add_device))
        .route("/v1/devices/{name}", get(device).delete(remove_device))
        .route("/v1/devices/{name}/resize", post(resize))
        .route("/v1/devices/{name}/offer", post(offer).delete(withdraw))
        .route("/v1/devices/{name}/exchange", post(exchange).patch(exchange_limit).delete(exchange_cancel))
        .route("/v1/vms", get(vms).post(run_vm))
        .route("/v1/vms/adopt", post(adopt_vm))
        .route("/v1/vms/{name}", axum::routing::delete(stop_vm))
        .route("/v1/vms/{name}/migrate", post(migrate))
        .route("/v1/operations/{id}", get(operation))
        .route("/v1/operations/{id}/abort", post(abort))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(openapi))
        .fallback(|| async {
            AgentError::not_found("there is no such call; `belay api` describes those that are")
        })
        .layer(axum::middleware::map_response(in_our_form))
        .with_state(agent)
}

/// Errors of the server itself, such as a body that is too large, in the form of ours.
async fn in_our_form(response: Response) -> Response {
    let status = response.status();
    let ours = response
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    if ours || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let (parts, body) = response.into_parts();
    let text = axum::body::to_bytes(body, 4096).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&text).trim().to_owned();
    let message = match status {
        StatusCode::METHOD_NOT_ALLOWED => "this call has another method; `belay api` describes it".to_owned(),
        _ if text.is_empty() => status.to_string(),
        _ => format!("the request is not understood: {text}"),
    };
    let mut response = (status, Json(AgentError::usage(message))).into_response();
    let allow = axum::http::header::ALLOW;
    response.headers_mut().extend(parts.headers.get(&allow).map(|methods| (allow, methods.clone())));
    response
}

/// Reads a body such that what is wrong with it is said in our form.
fn body<T: serde::de::DeserializeOwned>(bytes: &Bytes) -> Result<T, AgentError> {
    let bytes: &[u8] = if bytes.is_empty() { b"{}" } else { bytes };
    serde_json::from_slice(bytes)
        .map_err(|error| AgentError::usage(format!("the request is not understood: {error}")))
}

fn device_views(agent: &Agent) -> Vec<DeviceView> {
    agent.devices().iter().map(|device| device_view(agent, device)).collect()
}

#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = StatusView)))]
async fn status(State(agent): Shared) -> Json<StatusView> {
    let mut hosts: Vec<HostView> = agent
        .config
        .peers
        .iter()
        .map(|(name, addresses)| HostView { name: name.clone(), addresses: addresses.clone() })
        .collect();
    for known in belay_link::known_hosts(&agent.config.pki_dir()).unwrap_or_default() {
        if !hosts.iter().any(|host| host.name == known.name.to_string()) {
            hosts.push(HostView { name: known.name.to_string(), addresses: known.addresses });
        }
    }
    Json(StatusView {
        host: agent.host(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        devices: device_views(&agent),
        vms: agent.vm_views().await,
        hosts,
        operations: agent.operations.all().iter().map(|operation| operation.view()).collect(),
    })
}

/// Events as lines of JSON: those that are kept and, with `follow`, those that come.
#[utoipa::path(get, path = "/v1/events", params(Follow), responses((status = 200, body = Event, content_type = "application/x-ndjson")))]
async fn events(State(agent): Shared, Query(follow): Query<Follow>) -> Response {
    fn line(event: &Event) -> Result<Bytes, std::convert::Infallible> {
        let mut text = serde_json::to_string(event).unwrap_or_default();
        text.push('\n');
        Ok(Bytes::from(text))
    }
    let (kept, coming) = agent.events.follow();
    let past = tokio_stream::iter(kept.into_iter().map(|event| line(&event)));
    if !follow.follow {
        return Body::from_stream(past).into_response();
    }
    let future =
        BroadcastStream::new(coming).filter_map(|event| async { event.ok().map(|event| line(&event)) });
    Body::from_stream(past.chain(future)).into_response()
}

#[utoipa::path(get, path = "/v1/devices", responses((status = 200, body = Vec<DeviceView>)))]
async fn devices(State(agent): Shared) -> Json<Vec<DeviceView>> {
    Json(device_views(&agent))
}

#[utoipa::path(get, path = "/v1/devices/{name}", responses((status = 200, body = DeviceView)))]
async fn device(State(agent): Shared, Path(name): Path<String>) -> Answer<DeviceView> {
    Ok(Json(device_view(&agent, &*agent.device(&name)?)))
}

#[utoipa::path(post, path = "/v1/devices", request_body = NewDevice, responses((status = 200, body = DeviceView)))]
async fn add_device(State(agent): Shared, bytes: Bytes) -> Answer<DeviceView> {
    let device = agent.add_new_device(&body(&bytes)?).await?;
    Ok(Json(device_view(&agent, &device)))
}

#[utoipa::path(delete, path = "/v1/devices/{name}", responses((status = 204)))]
async fn remove_device(State(agent): Shared, Path(name): Path<String>) -> Result<StatusCode, AgentError> {
    agent.remove_device(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[utoipa::path(post, path = "/v1/devices/{name}/resize", request_body = Resize, responses((status = 200, body = DeviceView)))]
async fn resize(State(agent): Shared, Path(name): Path<String>, bytes: Bytes) -> Answer<DeviceView> {
    let request: Resize = body(&bytes)?;
    agent.resize_device(&name, request.size_bytes).await?;
    Ok(Json(device_view(&agent, &*agent.device(&name)?)))
}

/// Returns when a VMM at the other host may connect; the same offer again says the same.
#[utoipa::path(post, path = "/v1/devices/{name}/offer", request_body = OfferBody, responses((status = 200, body = OfferView)))]
async fn offer(State(agent): Shared, Path(name): Path<String>, bytes: Bytes) -> Answer<OfferView> {
    let request: OfferBody = body(&bytes)?;
    let device = agent.device_or_gone(&name)?;
    Ok(Json(agent.offer_device(&device, &request.to, request.mode, request.dry_run).await?))
}

/// Without an offer nothing is done; after the other host has asked for the device it is too late.
#[utoipa::path(delete, path = "/v1/devices/{name}/offer", responses((status = 200, body = WithdrawView)))]
async fn withdraw(State(agent): Shared, Path(name): Path<String>) -> Answer<WithdrawView> {
    let device = agent.device_or_gone(&name)?;
    Ok(Json(agent.withdraw_device(&device).await?))
}

#[utoipa::path(post, path = "/v1/devices/{name}/exchange", request_body = ExchangeBody, responses((status = 202)))]
async fn exchange(
    State(agent): Shared,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Result<StatusCode, AgentError> {
    let request: ExchangeBody = body(&bytes)?;
    let device = agent.device(&name)?;
    agent.begin_exchange(&device, request.path, request.bandwidth).await?;
    Ok(StatusCode::ACCEPTED)
}

#[utoipa::path(patch, path = "/v1/devices/{name}/exchange", request_body = ExchangeBody, responses((status = 202)))]
async fn exchange_limit(
    State(agent): Shared,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Result<StatusCode, AgentError> {
    let request: ExchangeBody = body(&bytes)?;
    let device = agent.device(&name)?;
    agent.limit_exchange(&device, request.bandwidth).await?;
    Ok(StatusCode::ACCEPTED)
}

#[utoipa::path(delete, path = "/v1/devices/{name}/exchange", responses((status = 202)))]
async fn exchange_cancel(State(agent): Shared, Path(name): Path<String>) -> Result<StatusCode, AgentError> {
    let device = agent.device(&name)?;
    if agent.stop_following(&device).await? || device.snapshot().exchange.is_none() {
        // It was ended before, or never began: what is asked for is so.
        return Ok(StatusCode::ACCEPTED);
    }
    let mark = device.mark();
    device.send(Command::CancelExchange);
    let done = device
        .wait_for(mark, "the end of the exchange", Duration::from_secs(30), |notice| match notice {
            Notice::ExchangeDone => Some(true),
            Notice::ExchangeCancelled => Some(false),
            _ => None,
        })
        .await?;
    if done {
        return Err(AgentError::precheck(format!("the exchange of device {name} was done already")));
    }
    Ok(StatusCode::ACCEPTED)
}

#[utoipa::path(get, path = "/v1/vms", responses((status = 200, body = Vec<VmView>)))]
async fn vms(State(agent): Shared) -> Json<Vec<VmView>> {
    Json(agent.vm_views().await)
}

#[derive(Serialize, ToSchema)]
struct Started {
    name: String,
    /// It ran before, with this specification.
    already: bool,
}

#[utoipa::path(post, path = "/v1/vms", request_body = RunVm, responses((status = 200, body = Started)))]
async fn run_vm(State(agent): Shared, bytes: Bytes) -> Answer<Started> {
    let request: RunVm = body(&bytes)?;
    let (vm, started) = agent.run_vm(&request.spec_toml, request.folder.as_deref()).await?;
    Ok(Json(Started { name: vm.record.name.clone(), already: !started }))
}

#[utoipa::path(post, path = "/v1/vms/adopt", request_body = AdoptVm, responses((status = 200, body = AdoptedView)))]
async fn adopt_vm(State(agent): Shared, bytes: Bytes) -> Answer<AdoptedView> {
    let request: AdoptVm = body(&bytes)?;
    Ok(Json(agent.adopt_vm(&request.name, &request.qmp, request.devices).await?))
}

#[utoipa::path(delete, path = "/v1/vms/{name}", responses((status = 204)))]
async fn stop_vm(State(agent): Shared, Path(name): Path<String>) -> Result<StatusCode, AgentError> {
    agent.stop_vm(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[utoipa::path(post, path = "/v1/vms/{name}/migrate", request_body = MigrateBody, responses((status = 200, body = OperationView)))]
async fn migrate(State(agent): Shared, Path(name): Path<String>, bytes: Bytes) -> Answer<OperationView> {
    let body: MigrateBody = body(&bytes)?;
    let request =
        crate::migrate::Request { vm: name, to: body.to, mode: body.mode, bandwidth: body.bandwidth };
    Ok(Json(agent.migrate(request, body.dry_run).await?.view()))
}

#[utoipa::path(get, path = "/v1/operations/{id}", responses((status = 200, body = OperationView)))]
async fn operation(State(agent): Shared, Path(id): Path<String>) -> Answer<OperationView> {
    Ok(Json(agent.operations.get(&id)?.view()))
}

#[utoipa::path(post, path = "/v1/operations/{id}/abort", responses((status = 200, body = Aborted)))]
async fn abort(State(agent): Shared, Path(id): Path<String>) -> Answer<Aborted> {
    let operation = agent.operations.get(&id)?;
    if !operation.ask_abort() {
        let message = if operation.view().phase == crate::operation::RECOVER {
            "the agent was restarted and finds out where the VM is: it is taken back, unless it was too late then"
        } else {
            "too late: the devices are moving or have moved; it goes on"
        };
        return Ok(Json(Aborted { aborted: false, message: message.to_owned() }));
    }
    let mut view = operation.view();
    while view.state == "running" {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        view = operation.view();
    }
    let aborted = view.state == "cancelled";
    let message =
        if aborted { "the VM goes on here" } else { "it was finished before it could be taken back" };
    Ok(Json(Aborted { aborted, message: message.to_owned() }))
}

/// Metrics in the OpenMetrics text format.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String, content_type = METRICS_TYPE)))]
async fn metrics(State(agent): Shared) -> Response {
    ([(CONTENT_TYPE, METRICS_TYPE)], crate::metrics::render(&agent)).into_response()
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, body = Object)))]
async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(description())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;

    /// Path and method of every route in this file's text.
    fn routes() -> BTreeSet<(String, String)> {
        let mut routes = BTreeSet::new();
        for line in include_str!("api.rs").lines() {
            let Some(rest) = line.trim().strip_prefix(".route(\"") else { continue };
            let (path, handlers) = rest.split_once('"').unwrap();
            for method in ["get", "post", "patch", "delete"] {
                if handlers.contains(&format!("{method}(")) {
                    routes.insert((path.to_owned(), method.to_owned()));
                }
            }
        }
        routes
    }

    #[test]
    fn description_has_every_route_with_its_parameters_and_errors_and_nothing_else() {
        let description = serde_json::to_value(description()).unwrap();
        let mut described = BTreeSet::new();
        for (path, item) in description["paths"].as_object().unwrap() {
            for (method, call) in item.as_object().unwrap() {
                described.insert((path.clone(), method.clone()));
                assert!(call["responses"]["default"].is_object(), "{method} {path} has no error");
                let named = path.matches('{').count();
                let parameters = call["parameters"].as_array().unwrap();
                assert_eq!(parameters.iter().filter(|p| p["in"] == "path").count(), named, "{method} {path}");
            }
        }
        assert_eq!(described, routes());
        assert!(described.len() > 15, "the routes are not found in the text any more");
    }

    #[test]
    fn every_schema_that_is_referred_to_is_described() {
        fn references(value: &Value, found: &mut BTreeSet<String>) {
            match value {
                Value::Object(fields) => {
                    found.extend(fields.get("$ref").and_then(Value::as_str).map(str::to_owned));
                    fields.values().for_each(|value| references(value, found));
                }
                Value::Array(values) => values.iter().for_each(|value| references(value, found)),
                _ => {}
            }
        }
        let description = serde_json::to_value(description()).unwrap();
        let mut found = BTreeSet::new();
        references(&description, &mut found);
        assert!(found.len() > 10, "{found:?}");
        for reference in found {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(description.pointer(pointer).is_some(), "{reference} is not described");
        }
    }
}
