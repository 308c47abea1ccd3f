package main

// What translate makes of a pipeline for Kubernetes: a list of objects of v1, apps/v1, batch/v1 and networking.k8s.io/v1.

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// object is what has no type of its own here.
type object map[string]any

// kubeObject is an object that is applied.
type kubeObject struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Metadata   kubeMetadata      `json:"metadata"`
	Data       map[string]string `json:"data,omitempty"`
	Spec       any               `json:"spec,omitempty"`
}

type kubeMetadata struct {
	Name        string            `json:"name,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type kubeTemplate struct {
	Metadata kubeMetadata `json:"metadata"`
	Spec     kubePod      `json:"spec"`
}

type kubePod struct {
	RestartPolicy                 string          `json:"restartPolicy,omitempty"`
	AutomountServiceAccountToken  bool            `json:"automountServiceAccountToken"` // never: nothing here asks the API
	EnableServiceLinks            bool            `json:"enableServiceLinks"`           // never: a Service named health would set HEALTH_PORT
	TerminationGracePeriodSeconds int             `json:"terminationGracePeriodSeconds"`
	SecurityContext               object          `json:"securityContext"`
	Tolerations                   []object        `json:"tolerations"`
	InitContainers                []kubeContainer `json:"initContainers,omitempty"`
	Containers                    []kubeContainer `json:"containers"`
	Volumes                       []object        `json:"volumes,omitempty"`
}

type kubeContainer struct {
	Name            string         `json:"name"`
	Image           string         `json:"image"`
	Args            []string       `json:"args,omitempty"`
	WorkingDir      string         `json:"workingDir,omitempty"`
	Env             []kubeVariable `json:"env,omitempty"`
	Ports           []object       `json:"ports,omitempty"`
	StartupProbe    object         `json:"startupProbe,omitempty"`
	ReadinessProbe  object         `json:"readinessProbe,omitempty"`
	LivenessProbe   object         `json:"livenessProbe,omitempty"`
	SecurityContext object         `json:"securityContext,omitempty"`
	VolumeMounts    []kubeMount    `json:"volumeMounts,omitempty"`
}

type kubeVariable struct {
	Name      string `json:"name"`
	Value     string `json:"value,omitempty"`
	ValueFrom object `json:"valueFrom,omitempty"`
}

type kubeMount struct {
	Name      string `json:"name"`
	MountPath string `json:"mountPath"`
	ReadOnly  bool   `json:"readOnly,omitempty"`
}

const (
	// Names of objects are a pipeline's, a dash and a component's, in lower case. Each pod has them in labels of 63
	// characters, with what Kubernetes adds: a StatefulSet 11, and a Job the 9 of its hash here.
	maxKubePipeline = 63 - 11 - len("-"+planeName)
	maxKubeName     = 63 - 9

	nobodyID = 65534 // the user of flowctl's own containers
)

var (
	dnsLabel   = pattern(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)
	startsAZ   = pattern(`^[a-z]`)
	numberUser = pattern(`^[0-9]{1,9}(:[0-9]{1,9})?$`)
)

func checkForKubernetes(t *translation, f findings) {
	name := &t.p.Metadata.Name
	switch lower := strings.ToLower(*name); {
	case !dnsLabel().MatchString(lower) || !startsAZ().MatchString(lower):
		f.wrong(name, "cannot be a name of Kubernetes, which has letters, digits and -, and begins with a letter: %s", quote(*name))
	case len(lower) > maxKubePipeline:
		f.wrong(name, "has %d characters, and names of Kubernetes leave %d for it", len(lower), maxKubePipeline)
	}
	checkCollisions(f, t.p.components(), strings.ToLower)
}

func checkComponentForKubernetes(t *translation, f findings, c *Component) {
	switch lower := strings.ToLower(c.ID); {
	case !dnsLabel().MatchString(lower):
		f.wrong(&c.ID, "cannot be a name of Kubernetes, which has letters, digits and -, and no - at an end: %s", quote(c.ID))
	case len(t.kubeName(c.ID)) > maxKubeName:
		f.wrong(&c.ID, "has %d characters, and the name of the pipeline and this one have %d at most together there", len(lower), maxKubeName-1)
	}
	if c.User != "" && !numberUser().MatchString(c.User) {
		f.wrong(&c.User, "must be numbers there, such as 1000 or 1000:1000, not %s", quote(c.User))
	}
	for i, volume := range c.Volumes {
		host, rest, isPath := volumeHost(volume)
		_, options, _ := strings.Cut(rest, ":")
		switch {
		case isPath:
			f.wrongEntry(&c.Volumes, i, "is a folder of this machine, which no other machine has: name a volume, such as data:/path, or put it into the image")
		case !dnsLabel().MatchString(host) || len(t.kubeName(host)) > 63:
			f.wrongEntry(&c.Volumes, i, "cannot be a name of Kubernetes, which has lower case letters, digits and -, and is short: %s", quote(host))
		case !slices.Contains([]string{"", "ro", "rw"}, options):
			f.wrongEntry(&c.Volumes, i, "option %s: there is only ro", quote(options))
		}
	}
	taken := make(map[publishedAs]bool)
	for i, entry := range c.Ports {
		if checkPort(entry) != nil {
			continue
		}
		port := parsePort(entry)
		port.inside = 0
		if taken[port] {
			f.wrongEntry(&c.Ports, i, "publishes port %d a second time, and a Service has one address", port.outside)
		}
		taken[port] = true
	}
	if c.Oneshot {
		f.wrong(&c.Oneshot, "cannot be moved to Kubernetes yet: the control plane there does not know when a oneshot has ended")
	}
	if u := c.healthURL("1"); u != nil && u.Scheme == "grpc" && !isLoopback(u.Hostname()) {
		f.wrong(&c.HealthCheck, "asks %s: Kubernetes asks the component itself by gRPC, and nothing else", quote(u.Hostname()))
	}
}

// kubeName returns the name of what belongs to a component, or to what flowctl adds; of a service, where it is reached.
func (t *translation) kubeName(id string) string {
	return strings.ToLower(t.p.Metadata.Name + "-" + id)
}

// kubeLabels are those of all that belongs to id, "" for the pipeline.
func (t *translation) kubeLabels(id string) map[string]string {
	labels := t.selector(id)
	labels["app.kubernetes.io/managed-by"] = "flowctl"
	return labels
}

// selector selects the pods of id, "" for all of the pipeline.
func (t *translation) selector(id string) map[string]string {
	labels := map[string]string{"app.kubernetes.io/part-of": strings.ToLower(t.p.Metadata.Name)}
	if id != "" {
		labels["app.kubernetes.io/component"] = strings.ToLower(id)
	}
	return labels
}

// kube returns an object of id.
func (t *translation) kube(apiVersion, kind, name, id string, spec any) kubeObject {
	return kubeObject{APIVersion: apiVersion, Kind: kind, Metadata: kubeMetadata{Name: name, Labels: t.kubeLabels(id)}, Spec: spec}
}

// kubePlane is where the control plane listens.
func (t *translation) kubePlane() string {
	return t.kubeName(planeName) + ":" + strconv.Itoa(planePort)
}

func toKubernetes(t *translation) any {
	items := t.kubePlaneObjects()
	items = append(items, t.kubeVolumes()...)
	for _, c := range t.p.components() {
		items = append(items, t.kubeComponent(c)...)
	}
	t.adviseSecrets()
	if t.canEnd() {
		items = append(items, t.kubeDone(hashOf(items)))
	}
	return object{"apiVersion": "v1", "kind": "List", "items": items}
}

// kubePlaneObjects returns what the control plane is made of.
func (t *translation) kubePlaneObjects() []kubeObject {
	name := t.kubeName(planeName)
	file := t.kube("v1", "ConfigMap", name, planeName, nil)
	file.Data = map[string]string{"pipeline.json": t.planeFile(func(*Component) bool { return true })}
	port := object{"name": "grpc", "port": planePort, "targetPort": "grpc", "appProtocol": "kubernetes.io/h2c"}
	pod := t.kubePlanePod()
	template := t.template(planeName, pod)
	template.Metadata.Annotations = map[string]string{"flowctl/pipeline": hashOf(file.Data)} // a changed file starts it anew
	return []kubeObject{
		file,
		t.kube("v1", "Service", name, planeName, object{"selector": t.selector(planeName), "ports": []object{port}}),
		t.kube("apps/v1", "StatefulSet", name, planeName, object{
			"serviceName": name, "replicas": 1, "selector": object{"matchLabels": t.selector(planeName)},
			"volumeClaimTemplates": []object{{"metadata": object{"name": "state"}, "spec": claim()}}, "template": template,
		}),
		t.kube("networking.k8s.io/v1", "NetworkPolicy", name, planeName, object{
			"podSelector": object{"matchLabels": t.selector(planeName)}, "policyTypes": []string{"Ingress"},
			"ingress": []object{{"from": []object{{"podSelector": object{"matchLabels": t.selector("")}}}, "ports": []object{{"port": "grpc"}}}},
		}),
	}
}

func (t *translation) kubePlanePod() kubePod {
	check := object{"grpc": object{"port": planePort}}
	plane := t.ownContainer("flowctl", serverArgs("-advertise", t.kubePlane())...)
	plane.Env = []kubeVariable{{Name: "XDG_RUNTIME_DIR", Value: "/tmp"}}
	plane.Ports = []object{{"name": "grpc", "containerPort": planePort}}
	plane.StartupProbe = kubeProbe(check, 1, 5, 60)
	plane.ReadinessProbe = kubeProbe(check, 5, 5, 3)
	plane.LivenessProbe = kubeProbe(check, 20, 15, 6) // lenient: a node that stalls must not kill it
	plane.VolumeMounts = []kubeMount{{Name: "state", MountPath: planeState}, {Name: "pipeline", MountPath: "/etc/flowctl", ReadOnly: true}, {Name: "tmp", MountPath: "/tmp"}}
	pod := newPod(15)
	pod.SecurityContext["fsGroup"] = nobodyID
	pod.Containers = []kubeContainer{plane}
	pod.Volumes = []object{
		{"name": "pipeline", "configMap": object{"name": t.kubeName(planeName)}},
		{"name": "tmp", "emptyDir": object{"medium": "Memory", "sizeLimit": "1Mi"}},
	}
	return pod
}

// newPod returns a pod that a dead node loses soon, and that has that many seconds to stop.
func newPod(stop int) kubePod {
	pod := kubePod{TerminationGracePeriodSeconds: stop, SecurityContext: object{"seccompProfile": object{"type": "RuntimeDefault"}}}
	for _, key := range []string{"not-ready", "unreachable"} {
		pod.Tolerations = append(pod.Tolerations, object{"key": "node.kubernetes.io/" + key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5})
	}
	return pod
}

// template returns the pods of id.
func (t *translation) template(id string, pod kubePod) kubeTemplate {
	return kubeTemplate{Metadata: kubeMetadata{Labels: t.kubeLabels(id)}, Spec: pod}
}

// ownContainer returns a container of flowctl itself, as the strictest of the pod security standards has it.
func (t *translation) ownContainer(name string, args ...string) kubeContainer {
	return kubeContainer{Name: name, Image: t.image, Args: args, SecurityContext: object{
		"runAsNonRoot": true, "runAsUser": nobodyID, "runAsGroup": nobodyID, "allowPrivilegeEscalation": false,
		"readOnlyRootFilesystem": true, "capabilities": object{"drop": []string{"ALL"}},
	}}
}

// kubeVolumes returns the claims of the volumes that have a name.
func (t *translation) kubeVolumes() []kubeObject {
	var out []kubeObject
	users := make(map[string]string)
	for _, c := range t.p.components() {
		for i, volume := range c.Volumes {
			host, _, _ := volumeHost(volume)
			name := t.kubeName(host)
			if first, ok := users[name]; ok && first != c.ID {
				t.warn(c, fmt.Sprintf("volumes[%d]", i), "is a volume of %s too: Kubernetes has to run both on one machine, which the first of them chooses", first)
			} else if !ok {
				out = append(out, t.kube("v1", "PersistentVolumeClaim", name, "", claim()))
				t.warn(c, fmt.Sprintf("volumes[%d]", i), "claims 1Gi: put in place of it what it needs")
			}
			users[name] = c.ID
		}
	}
	return out
}

// claim is of a volume that one machine at a time may write.
func claim() object {
	return object{"accessModes": []string{"ReadWriteOnce"}, "resources": object{"requests": object{"storage": "1Gi"}}}
}

// kubeComponent returns what c is made of.
func (t *translation) kubeComponent(c *Component) []kubeObject {
	pod := newPod(c.stopSeconds())
	t.setUser(c, &pod)
	pod.InitContainers = []kubeContainer{t.ownContainer("wait", waitArgs(t.kubePlane(), t.waitsFor(c)...)...)}
	pod.Containers = []kubeContainer{t.componentContainer(c, &pod)}
	t.warnForKubernetes(c)
	return append(t.kubeService(c), t.kubeWorkload(c, pod))
}

// componentContainer returns the container of c in pod, which gets its volumes.
func (t *translation) componentContainer(c *Component, pod *kubePod) kubeContainer {
	own := kubeContainer{Name: "component", Image: c.Image, Args: doubleInAll(c.Args), WorkingDir: c.WorkingDir}
	vars := t.variables(c, t.kubePlane())
	for _, name := range slices.Sorted(maps.Keys(vars)) {
		own.Env = append(own.Env, kubeVariable{Name: name, Value: doubleDollars(vars[name])})
	}
	for _, name := range slices.Sorted(maps.Keys(c.EnvFiles)) {
		own.Env = append(own.Env, kubeVariable{Name: name, ValueFrom: object{"secretKeyRef": object{"name": t.kubeName(c.ID), "key": name}}})
	}
	for _, entry := range c.Ports {
		port := parsePort(entry)
		own.Ports = append(own.Ports, object{"containerPort": port.inside, "protocol": strings.ToUpper(port.protocol)})
	}
	named := make(map[string]bool)
	for _, volume := range c.Volumes {
		host, rest, _ := volumeHost(volume)
		path, options, _ := strings.Cut(rest, ":")
		own.VolumeMounts = append(own.VolumeMounts, kubeMount{Name: host, MountPath: path, ReadOnly: options == "ro"})
		if !named[host] {
			pod.Volumes = append(pod.Volumes, object{"name": host, "persistentVolumeClaim": object{"claimName": t.kubeName(host)}})
		}
		named[host] = true
	}
	if check := t.kubeCheck(c); check != nil {
		own.StartupProbe = kubeProbe(check, 1, seconds(c.healthTimeout()), c.startSeconds())
		own.ReadinessProbe = kubeProbe(check, seconds(c.healthInterval()), seconds(c.healthTimeout()), c.healthRetries())
	}
	return own
}

// setUser has the containers of pod run as c says, and gives that user its volumes.
func (t *translation) setUser(c *Component, pod *kubePod) {
	if c.User == "" {
		return
	}
	uid, gid, hasGroup := strings.Cut(c.User, ":")
	pod.SecurityContext["runAsUser"] = json.Number(uid)
	if hasGroup {
		pod.SecurityContext["runAsGroup"] = json.Number(gid)
	}
	if len(c.Volumes) > 0 {
		pod.SecurityContext["fsGroup"] = json.Number(uid)
		if hasGroup {
			pod.SecurityContext["fsGroup"] = json.Number(gid)
		}
	}
}

// kubeCheck returns the check of c by Kubernetes, nil for none.
func (t *translation) kubeCheck(c *Component) object {
	if len(c.HealthCommand) > 0 {
		return object{"exec": object{"command": doubleInAll(c.HealthCommand)}}
	}
	u := c.healthURL(t.ports[c.ID])
	if u == nil {
		return nil
	}
	at := object{"port": healthPort(u)}
	if !isLoopback(u.Hostname()) {
		at["host"] = u.Hostname()
	}
	switch u.Scheme {
	case "tcp":
		return object{"tcpSocket": at}
	case "grpc":
		if service := strings.TrimPrefix(u.Path, "/"); service != "" {
			at["service"] = service
		}
		return object{"grpc": at}
	}
	at["path"], at["scheme"] = (&url.URL{Path: u.Path, RawPath: u.RawPath, RawQuery: u.RawQuery}).RequestURI(), strings.ToUpper(u.Scheme)
	return object{"httpGet": at}
}

// kubeProbe returns check, made each so many seconds.
func kubeProbe(check object, period, timeout, failures int) object {
	out := maps.Clone(check)
	out["periodSeconds"], out["timeoutSeconds"], out["failureThreshold"] = period, timeout, failures
	return out
}

// kubeWorkload returns what keeps the pod of c: a Deployment for one that is always started again, else a Job.
func (t *translation) kubeWorkload(c *Component, pod kubePod) kubeObject {
	if c.RestartPolicy == restartAlways {
		return t.kube("apps/v1", "Deployment", t.kubeName(c.ID), c.ID, object{
			"replicas": 1, "strategy": object{"type": "Recreate"}, "selector": object{"matchLabels": t.selector(c.ID)}, "template": t.template(c.ID, pod),
		})
	}
	limit := 0
	if c.RestartPolicy == restartOnFailure {
		limit = c.MaxRestarts
		if limit == 0 {
			limit = math.MaxInt32
		}
	}
	return t.kubeJob(c.ID, limit, pod)
}

// kubeJob returns a Job, which nobody can change: the name of another one differs.
func (t *translation) kubeJob(id string, limit int, pod kubePod) kubeObject {
	pod.RestartPolicy = "Never"
	spec := object{"backoffLimit": limit, "template": t.template(id, pod)}
	return t.kube("batch/v1", "Job", t.kubeName(id)+"-"+hashOf(spec), id, spec)
}

// kubeDone returns the Job that completes once all events have been moved: components that serve them never end.
func (t *translation) kubeDone(of string) kubeObject {
	pod := newPod(1)
	pod.Containers = []kubeContainer{t.ownContainer("wait", doneArgs(t.kubePlane())...)}
	job := t.kubeJob(doneName, math.MaxInt32, pod)
	job.Metadata.Name = t.kubeName(doneName) + "-" + of
	t.advice = append(t.advice, "# This waits until all events have been moved, where flowctl moves them:", "kubectl wait --for=condition=complete --timeout=-1s job/"+job.Metadata.Name)
	return job
}

// kubeService returns the name of c on the network: for its ports, and for a service, which others dial, without them too.
func (t *translation) kubeService(c *Component) []kubeObject {
	if !c.isReached() {
		return nil
	}
	spec := object{"selector": t.selector(c.ID), "clusterIP": "None"} // without ports the name is that of its pod
	if len(c.Ports) > 0 {
		var ports []object
		for _, entry := range c.Ports {
			port := parsePort(entry)
			ports = append(ports, object{
				"name": fmt.Sprintf("%d-%s", port.outside, port.protocol), "port": port.outside, "targetPort": port.inside, "protocol": strings.ToUpper(port.protocol),
			})
		}
		delete(spec, "clusterIP")
		spec["ports"] = ports
	}
	return []kubeObject{t.kube("v1", "Service", t.kubeName(c.ID), c.ID, spec)}
}

// warnForKubernetes warns of what of c is lost.
func (t *translation) warnForKubernetes(c *Component) {
	u := c.healthURL(t.ports[c.ID])
	if c.StopSignal != "" && c.StopSignal != "SIGTERM" {
		t.warn(c, "stop_signal", "is lost: Kubernetes sends SIGTERM, or the STOPSIGNAL of the image")
	}
	if c.RestartPolicy == restartAlways && c.MaxRestarts > 0 {
		t.warn(c, "max_restarts", "is lost: Kubernetes starts it again for ever")
	}
	if c.StartTimeout != 0 && c.HealthCheck == "" {
		t.warn(c, "start_timeout", "is lost: without a health_check Kubernetes does not know when it has started")
	}
	if u != nil && isLoopback(u.Hostname()) {
		t.warn(c, "health_check", "is made from outside the pod: a listener on 127.0.0.1 alone never passes")
	}
	if c.HealthCheck != "" {
		t.warn(c, "health_check", "is made by Kubernetes alone: it is no heartbeat for the control plane")
	}
}

// adviseSecrets tells how the files of env_files become secrets.
func (t *translation) adviseSecrets() {
	var lines []string
	for _, c := range t.p.components() {
		line := "kubectl create secret generic " + t.kubeName(c.ID)
		for _, name := range slices.Sorted(maps.Keys(c.EnvFiles)) {
			line += fmt.Sprintf(` --from-file=%s=<(printf %%s "$(cat %s)")`, name, shellWord(c.EnvFiles[name]))
		}
		if len(c.EnvFiles) > 0 {
			lines = append(lines, line)
		}
	}
	if len(lines) > 0 {
		t.advice = slices.Concat(t.advice, []string{"# These make the secrets of env_files, in bash:"}, lines)
	}
}

// hashOf returns 8 digits that differ for what differs.
func hashOf(v any) string {
	text, _ := json.Marshal(v) // it is of maps, lists and texts, which can be written
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:4])
}
