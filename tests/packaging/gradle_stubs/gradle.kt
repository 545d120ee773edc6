// Stand-ins for what the packages' build.gradle.kts uses of Gradle and of the Android Gradle plugin,
// with the names of their documentation. They hold what the script sets, and `main` prints it.

class Plugins {
    val ids = mutableListOf<String>()

    fun id(name: String) {
        ids += name
    }
}

enum class JavaVersion { VERSION_17 }

class Ndk {
    val abiFilters: MutableSet<String> = mutableSetOf()
}

class DefaultConfig {
    var minSdk: Int? = null
    var testInstrumentationRunner: String? = null
    val ndk = Ndk()

    fun ndk(set: Ndk.() -> Unit) = ndk.set()
}

class Flavor(val name: String) {
    var dimension: String? = null
    var minSdk: Int? = null
}

class Assets {
    val folders = mutableListOf<String>()

    fun srcDir(path: Any) {
        folders += path.toString()
    }
}

class SourceSet(val name: String) {
    val assets = Assets()
}

class SourceSets {
    val known = listOf("main", "androidTest").associateWith { SourceSet(it) }.toMutableMap()

    operator fun get(name: String): SourceSet = known[name] ?: error("no source set $name")
}

class Flavors(private val sources: SourceSets) {
    val made = mutableListOf<Flavor>()

    fun create(name: String, set: Flavor.() -> Unit) {
        made += Flavor(name).apply(set)
        sources.known[name] = SourceSet(name)
    }
}

class AndroidResources {
    val noCompress: MutableCollection<String> = mutableListOf()
}

class CompileOptions {
    var sourceCompatibility: JavaVersion? = null
    var targetCompatibility: JavaVersion? = null
}

class LibraryExtension {
    var namespace: String? = null
    var compileSdk: Int? = null
    val defaultConfig = DefaultConfig()
    val flavorDimensions: MutableList<String> = mutableListOf()
    val sourceSets = SourceSets()
    val productFlavors = Flavors(sourceSets)
    val androidResources = AndroidResources()
    val compileOptions = CompileOptions()

    fun defaultConfig(set: DefaultConfig.() -> Unit) = defaultConfig.set()

    fun productFlavors(set: Flavors.() -> Unit) = productFlavors.set()

    fun androidResources(set: AndroidResources.() -> Unit) = androidResources.set()

    fun compileOptions(set: CompileOptions.() -> Unit) = compileOptions.set()
}

class KotlinExtension {
    var toolchain: Int? = null

    fun jvmToolchain(version: Int) {
        toolchain = version
    }
}

class Files(private val path: String) {
    override fun toString() = "file:$path"
}

class Dependencies {
    val named = mutableListOf<Pair<String, Any>>()

    fun implementation(what: Any) = "implementation"(what)

    fun androidTestImplementation(what: Any) = "androidTestImplementation"(what)

    operator fun String.invoke(what: Any) {
        val flavors = android.productFlavors.made.flatMap {
            val test = "androidTest" + it.name.replaceFirstChar(Char::uppercase) + "Implementation"
            listOf(it.name + "Implementation", it.name + "CompileOnly", test)
        }
        check(this in flavors + listOf("implementation", "androidTestImplementation")) { this }
        named += this to what
    }
}

val applied = Plugins()
val android = LibraryExtension()
val kotlin = KotlinExtension()
val used = Dependencies()

fun plugins(set: Plugins.() -> Unit) = applied.set()

fun android(set: LibraryExtension.() -> Unit) = android.set()

fun kotlin(set: KotlinExtension.() -> Unit) = kotlin.set()

fun dependencies(set: Dependencies.() -> Unit) = used.set()

fun files(path: String) = Files(path)

fun main() {
    script()
    applied.ids.forEach { println("plugin $it") }
    println("namespace ${android.namespace} ${android.compileSdk} ${kotlin.toolchain}")
    println("java ${android.compileOptions.sourceCompatibility} ${android.compileOptions.targetCompatibility}")
    println("runner ${android.defaultConfig.testInstrumentationRunner}")
    for (flavor in android.productFlavors.made) {
        check(flavor.dimension in android.flavorDimensions) { flavor.name }
        println("flavor ${flavor.name} ${flavor.minSdk ?: android.defaultConfig.minSdk}")
    }
    for (set in android.sourceSets.known.values) {
        set.assets.folders.forEach { println("assets ${set.name} $it") }
    }
    used.named.forEach { (configuration, what) -> println("dependency $configuration $what") }
}
