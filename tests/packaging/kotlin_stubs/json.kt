package org.json

class JSONArray {
    fun length(): Int = throw NotImplementedError()

    fun getInt(index: Int): Int = throw NotImplementedError()

    fun getJSONObject(index: Int): JSONObject = throw NotImplementedError()
}

class JSONObject(text: String) {
    fun getBoolean(name: String): Boolean = throw NotImplementedError()

    fun getJSONArray(name: String): JSONArray = throw NotImplementedError()

    fun optJSONArray(name: String): JSONArray? = throw NotImplementedError()

    fun getJSONObject(name: String): JSONObject = throw NotImplementedError()

    fun getString(name: String): String = throw NotImplementedError()

    fun getDouble(name: String): Double = throw NotImplementedError()

    fun keys(): Iterator<String> = throw NotImplementedError()
}
